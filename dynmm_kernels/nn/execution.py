"""The two ways to run the branches of one decision: everywhere, or each on its own samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .. import tree
from ..plan import RoutingPlan
from .arguments import Arguments, gather_arguments
from .branch import Branch


@dataclass(frozen=True)
class Decision:
    """Who goes where.

    Attributes:
        choice: int64 [N].
        probs: the gate's softmax [N, B], where somebody needs it.
        gradient: how the gate learns from this batch, "straight_through" or "selected"; None: it
            does not.
    """

    choice: Tensor
    probs: Tensor | None
    plan: RoutingPlan
    gradient: str | None


def run_everywhere(
    branches: Sequence[Branch], inputs: tuple[Any, ...], weights: Tensor, soft: bool
) -> tuple[Any, tuple[int, ...]]:
    """Every branch on every sample, then the weighted sum: what DynMM's own code does."""
    num_rows = weights.shape[0]
    outputs = [branch.call(_arguments(branch, inputs).whole(num_rows)) for branch in branches]
    rows_run = (num_rows,) * len(outputs)
    columns, spec = F.check_outputs(outputs, rows_run, [branch.label for branch in branches])
    return tree.unflatten([_blend(column, weights, soft) for column in columns], spec), rows_run


def run_routed(
    branches: Sequence[Branch], inputs: tuple[Any, ...], decision: Decision, subset_norm: bool
) -> tuple[Any, tuple[int, ...]]:
    """Each branch on the samples that chose it; at least one sample chose one.

    Where the gate's exact gradient is recorded, the other samples follow without a graph.
    """
    plan = decision.plan
    whole = {} if subset_norm else _run_coupled(branches, inputs, plan.num_rows)
    own = [b for b, n in enumerate(plan.counts) if n]
    outputs = _run_rows(branches, inputs, plan, own, whole)
    labels = [branches[b].label for b in own]
    rows = [plan.counts[b] for b in own]
    rows_run = [plan.num_rows if b in whole else n for b, n in enumerate(plan.counts)]

    rest: list[int] = []
    if decision.gradient == "straight_through":
        complement = _complement(decision)
        rest = [b for b, n in enumerate(complement.counts) if n]
        with torch.no_grad(), ExitStack() as stack:
            for b in rest:
                stack.enter_context(branches[b].frozen_statistics())
            outputs += _run_rows(branches, inputs, complement, rest, whole)
        labels += [branches[b].label for b in rest]
        rows += [complement.counts[b] for b in rest]
        rows_run = [plan.num_rows] * len(branches)

    columns, spec = F.check_outputs(outputs, rows, labels)
    if decision.gradient is None:
        combined = [_combine(plan, column, own) for column in columns]
    else:
        if decision.gradient == "straight_through":
            probs, index = decision.probs, complement.inverse + plan.num_rows
            index.scatter_(1, decision.choice.unsqueeze(1), plan.inverse)
            rest_starts = [complement.starts[b] + plan.num_rows for b in rest]
        else:
            probs, index = decision.probs.gather(1, decision.choice.unsqueeze(1)), plan.inverse
            rest_starts = []
        starts = [plan.starts[b] for b in own]
        combined = [
            F.combine_selected(
                plan, column[: len(own)], starts, probs, column[len(own) :], rest_starts, index
            )
            for column in columns
        ]
    if torch.is_grad_enabled() and len(own) < len(branches):
        _touch_starved(combined, branches, inputs, set(own))
    return tree.unflatten(combined, spec), tuple(rows_run)


def _arguments(branch: Branch, inputs: tuple[Any, ...]) -> Arguments:
    return Arguments(branch.select(inputs), branch.label)


def _run_coupled(
    branches: Sequence[Branch], inputs: tuple[Any, ...], num_rows: int
) -> dict[int, Any]:
    """Outputs for the whole batch of the branches whose BatchNorm needs it."""
    return {
        b: branch.call(_arguments(branch, inputs).whole(num_rows))
        for b, branch in enumerate(branches)
        if branch.couples_samples
    }


def _run_rows(
    branches: Sequence[Branch],
    inputs: tuple[Any, ...],
    plan: RoutingPlan,
    wanted: Sequence[int],
    whole: dict[int, Any],
) -> list[Any]:
    """The outputs of the branches `wanted` for the rows that `plan` gives them."""
    alone = [(b, _arguments(branches[b], inputs)) for b in wanted if b not in whole]
    arguments = gather_arguments(plan, alone)
    arguments.reverse()
    outputs = []
    for b in wanted:
        if b in whole:
            outputs.append(_rows_of(plan, b, whole[b]))
        else:
            outputs.append(branches[b].call(arguments.pop()))  # frees the rows once they were used
    return outputs


def _rows_of(plan: RoutingPlan, branch: int, output: Any) -> Any:
    """A branch's own rows out of its output for the whole batch."""
    leaves, spec = tree.flatten(output)
    moves = [(i, branch) for i in range(len(leaves))]
    return tree.unflatten(F.gather_rows(plan, leaves, moves), spec)


def _complement(decision: Decision) -> RoutingPlan:
    """The plan of every (sample, branch) that was not chosen; its counts need no host copy."""
    plan = decision.plan
    mask = torch.ones(plan.num_rows, plan.num_branches, dtype=torch.bool, device=plan.order.device)
    mask.scatter_(1, decision.choice.unsqueeze(1), False)
    return F.route_complement(plan, mask)


def _combine(plan: RoutingPlan, column: Sequence[Any], own: Sequence[int]) -> Any:
    if len(own) == 1 and plan.counts[own[0]] == plan.num_rows:
        return column[0]
    return F.combine_rows(plan, column, [plan.starts[b] for b in own])


def _touch_starved(
    combined: list[Any], branches: Sequence[Branch], inputs: tuple[Any, ...], own: set[int]
) -> None:
    """Parameters and inputs of branches nobody chose get zero gradients, as when masked.

    So an optimiser treats them alike in both modes, and distributed training finds every
    parameter used.
    """
    starved = [branch for b, branch in enumerate(branches) if b not in own]
    tensors = [p for branch in starved for p in branch.parameters() if p.requires_grad]
    for branch in starved:
        tensors += [t for t in _arguments(branch, inputs).tensors() if t.requires_grad]
    if not tensors:
        return
    for i, leaf in enumerate(combined):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            combined[i] = F.touch(leaf, tensors)
            return


def _blend(column: Sequence[Any], weights: Tensor, soft: bool) -> Any:
    """sum_b weights[:, b] * column[b], in the dtype of the branches."""
    first = column[0]
    if not isinstance(first, Tensor):
        return first
    shape = (-1, *[1] * (first.ndim - 1))
    if first.is_floating_point() or first.is_complex():
        total = weights[:, 0].view(shape) * first
        for b, output in enumerate(column[1:], start=1):
            total = total + weights[:, b].view(shape) * output
        return total.to(first.dtype)
    if soft:
        raise TypeError(
            f"dense execution cannot blend an output of {first.dtype}; return floating tensors, "
            "or use masked or routed execution"
        )
    total = torch.zeros_like(first)
    for b, output in enumerate(column):
        total = torch.where(weights[:, b].view(shape) != 0, output, total)
    return total
