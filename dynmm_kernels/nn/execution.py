"""The two ways to run the branches of one decision: everywhere, or each on its own samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional as F
from .. import tree, validation
from ..plan import RoutingPlan
from .arguments import Arguments, gather_arguments
from .branch import Branch
from .memory import unaliased


class Learning(NamedTuple):
    """How the gate learns from a batch: `mode` is "straight_through" or "selected"."""

    mode: str
    probs: Tensor  # [N, B], with the gate's graph
    selected: Tensor  # bool [N, B]


def run_everywhere(
    branches: Sequence[Branch],
    batch: Arguments,
    weights: Tensor,
    soft: bool,
    several: bool = False,
) -> tuple[Any, tuple[int, ...]]:
    """Every branch on every sample, then the weighted sum: what DynMM's own code does.

    soft: weights other than 0 and 1. several: more than one of them may be 1.
    """
    num_rows = weights.shape[0]
    outputs = [call_whole(branch, batch, num_rows) for branch in branches]
    rows_run = (num_rows,) * len(outputs)
    columns, spec = validation.check_outputs(
        outputs, rows_run, [branch.label for branch in branches]
    )
    return tree.unflatten(
        [blend(column, weights, soft, several) for column in columns], spec
    ), rows_run


def run_routed(
    branches: Sequence[Branch],
    batch: Arguments,
    plan: RoutingPlan,
    learning: Learning | None,
    subset_norm: bool,
    weights: Tensor | None = None,
) -> tuple[Any, tuple[int, ...]]:
    """Each branch on the samples that chose it; at least one sample chose one.

    Where the gate's exact gradient is recorded, the other samples follow without a graph.
    `weights` [N, k]: of the ranks of the plan, instead of ones.
    """
    num_rows, counts = plan.num_rows, plan.counts
    own = [b for b, count in enumerate(counts) if count]
    rows = [counts[b] for b in own]
    whole: dict[int, Any] = {}
    if not subset_norm:
        whole = _run_coupled(branches, batch, num_rows)
    rest = None
    if learning is not None and learning.mode == "straight_through":
        rest = _run_rest(branches, batch, plan, learning, whole)  # before a graph holds memory
    outputs = _run_rows(branches, batch, plan, own, whole)
    if learning is not None:
        combined, spec = _learn(branches, plan, learning, own, outputs, rest)
    elif validation.single_tensors_fit(outputs, rows):
        combined, spec = [_combine(plan, outputs, own, batch, weights)], None
    else:
        columns, spec = validation.check_outputs(outputs, rows, [branches[b].label for b in own])
        combined = [_combine(plan, column, own, batch, weights) for column in columns]
    if len(own) < len(branches) and torch.is_grad_enabled():
        _touch_starved(combined, branches, batch, set(own))
    rows_run = counts
    if learning is not None and learning.mode == "straight_through":
        rows_run = (num_rows,) * len(branches)
    elif whole:
        rows_run = tuple(num_rows if b in whole else count for b, count in enumerate(counts))
    return tree.unflatten(combined, spec), rows_run


def call_whole(branch: Branch, batch: Arguments, num_rows: int | None) -> Any:
    """A branch on all samples, which it reads from the caller's tensors if it can be trusted."""
    own = branch.arguments(batch)
    return branch.call_reading(own.tensors(), own.whole(num_rows, copied=branch.in_place))


def _run_coupled(branches: Sequence[Branch], batch: Arguments, num_rows: int) -> dict[int, Any]:
    """Outputs for the whole batch of the branches whose BatchNorm needs it."""
    whole = {}
    for b, branch in enumerate(branches):
        if branch.couples_samples():
            whole[b] = call_whole(branch, batch, num_rows)
    return whole


def _run_rows(
    branches: Sequence[Branch],
    batch: Arguments,
    plan: RoutingPlan,
    wanted: Sequence[int],
    whole: dict[int, Any],
) -> list[Any]:
    """The outputs of the branches `wanted` for the rows that `plan` gives them."""
    alone = [b for b in wanted if b not in whole and plan.counts[b] < plan.num_rows]
    arguments: list[tuple[Any, ...]] = []
    if alone:
        arguments = gather_arguments(plan, alone, [branches[b].arguments(batch) for b in alone])
        arguments.reverse()
    outputs = []
    for b in wanted:
        if b in whole:
            outputs.append(_rows_of(plan, b, whole[b]))
        elif plan.counts[b] == plan.num_rows:
            outputs.append(call_whole(branches[b], batch, plan.num_rows))
        else:
            outputs.append(branches[b].call(arguments.pop()))  # the rows are freed once used
    return outputs


def _rows_of(plan: RoutingPlan, branch: int, output: Any) -> Any:
    """A branch's own rows out of its output for the whole batch."""
    leaves, spec = tree.flatten(output)
    rows = F.gather_rows(plan, leaves, range(len(leaves)), [branch] * len(leaves))
    return tree.unflatten(rows, spec)


class Rest(NamedTuple):
    """What the branches say of the samples they were not chosen for."""

    branches: list[int]
    outputs: list[Any]
    plan: RoutingPlan


def _run_rest(
    branches: Sequence[Branch],
    batch: Arguments,
    plan: RoutingPlan,
    learning: Learning,
    whole: dict[int, Any],
) -> Rest:
    """Forward only: the gradient of these outputs is zero."""
    complement = F.route_complement(plan, learning.selected)
    rest = [b for b, count in enumerate(complement.counts) if count]
    with without_graph(), ExitStack() as stack:
        for b in rest:
            stack.enter_context(branches[b].frozen_statistics())
        return Rest(rest, _run_rows(branches, batch, complement, rest, whole), complement)


@contextmanager
def without_graph() -> Iterator[None]:
    """torch.no_grad for modules that run again with a graph.

    In torch 2.10 autocast hands the weights it cast here, without a graph, to the later run,
    whose parameters then get no gradient; so it must not keep them.
    """
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(keeps)


def _learn(
    branches: Sequence[Branch],
    plan: RoutingPlan,
    learning: Learning,
    own: list[int],
    outputs: list[Any],
    rest: Rest | None,
) -> tuple[list[Any], tree.Spec]:
    """Combines `outputs` so that the gate learns, also from the `rest` where there is one."""
    labels = [branches[b].label for b in own]
    rows = [plan.counts[b] for b in own]
    index, rest_starts = torch.where(learning.selected, plan.inverse, -1), []
    if rest is not None:
        outputs = outputs + rest.outputs
        labels += [branches[b].label for b in rest.branches]
        rows += [rest.plan.counts[b] for b in rest.branches]
        # The slots of the rest stand behind those of the plan.
        last = plan.order.shape[0]
        rest_starts = [rest.plan.starts[b] + last for b in rest.branches]
        index = torch.where(learning.selected, plan.inverse, rest.plan.inverse + last)
    columns, spec = validation.check_outputs(outputs, rows, labels)
    starts, split = [plan.starts[b] for b in own], len(own)
    combined = [
        F.combine_selected(
            plan, column[:split], starts, learning.probs, column[split:], rest_starts, index
        )
        for column in columns
    ]
    return combined, spec


def _combine(
    plan: RoutingPlan,
    column: Sequence[Any],
    own: Sequence[int],
    batch: Arguments,
    weights: Tensor | None,
) -> Any:
    if weights is None and len(own) == 1 and plan.counts[own[0]] == plan.num_rows:
        return unaliased(column[0], batch.tensors())
    starts = plan.host_header
    return F.combine_rows(plan, column, [starts[b] for b in own], weights)


def _touch_starved(
    combined: list[Any], branches: Sequence[Branch], batch: Arguments, own: set[int]
) -> None:
    """Parameters and inputs of branches nobody chose get zero gradients, as when masked.

    So an optimiser treats them alike in both modes, and distributed training finds every
    parameter used.
    """
    tensors: list[Tensor] = []
    for b, branch in enumerate(branches):
        if b not in own:
            tensors += branch.parameters()
            tensors += branch.arguments(batch).tensors()
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    for i, leaf in enumerate(combined):
        if tensors and isinstance(leaf, Tensor) and leaf.is_floating_point():
            combined[i] = F.touch(leaf, tensors)
            return


def blend(column: Sequence[Any], weights: Tensor, soft: bool, several: bool = False) -> Any:
    """sum_b weights[:, b] * column[b], in the widest dtype of the branches."""
    first = column[0]
    if not isinstance(first, Tensor):
        return first
    shape = (-1, *[1] * (first.ndim - 1))
    if first.is_floating_point() or first.is_complex():
        total = weights[:, 0].view(shape) * first
        for b, output in enumerate(column[1:], start=1):
            total = total + weights[:, b].view(shape) * output
        return total.to(F.widest_dtype(column))
    if soft:
        raise TypeError(
            f"an output of {first.dtype} cannot be weighted; return floating tensors, or let one "
            "branch be chosen: masked or routed execution, select=1"
        )
    if several and first.dtype == torch.bool:
        raise TypeError("bool outputs of several branches cannot be summed; return integers")
    total = torch.zeros_like(first)
    for b, output in enumerate(column):
        chosen = weights[:, b].view(shape) != 0
        own = torch.where(chosen, output, torch.zeros_like(output))
        total = total + own if several else torch.where(chosen, output, total)
    return total
