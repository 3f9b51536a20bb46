"""The two ways to run the branches of one decision: everywhere, or each on its own samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...functional import checks, movement, sorting, tree
from ...functional.plan import RoutingPlan
from ..arguments import Arguments, gather_arguments
from ..branch import Branch, without_graph
from ..decision import blend
from ..memory import apart


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
    uniform: bool = False,
) -> tuple[Any, tuple[int, ...]]:
    """Every branch on every sample, then the weighted sum: what DynMM's own code does.

    soft: weights other than 0 and 1. several: more than one of them may be 1. uniform: all equal,
    in the precision of the outputs.
    """
    num_rows = weights.shape[0]
    outputs = [call_whole(branch, batch, num_rows) for branch in branches]
    rows_run = (num_rows,) * len(outputs)
    labels = [branch.label for branch in branches]
    columns, spec = checks.check_outputs(outputs, rows_run, labels, weights.device)
    combined = [
        blend(column, _equal_weights(weights, column) if uniform else weights, soft, several)
        for column in columns
    ]
    return tree.unflatten(combined, spec), rows_run


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
        whole = _run_coupled(branches, batch, num_rows, plan.order.device)
    rest = None
    if learning is not None and learning.mode == "straight_through":
        rest = _run_rest(branches, batch, plan, learning, whole)  # before a graph holds memory
    outputs = _run_rows(branches, batch, plan, own, whole)
    if learning is not None:
        combined, spec = _learn(branches, batch, plan, learning, own, outputs, rest)
    elif checks.single_tensors_fit(outputs, rows, plan.order.device):
        combined, spec = [_combine(plan, outputs, own, branches, batch, weights)], None
    else:
        labels = [branches[b].label for b in own]
        columns, spec = checks.check_outputs(outputs, rows, labels, plan.order.device)
        combined = [_combine(plan, column, own, branches, batch, weights) for column in columns]
    if len(own) < len(branches) and torch.is_grad_enabled():
        starved = [branch for b, branch in enumerate(branches) if b not in own]
        probs = [] if rest is None or learning is None else [learning.probs]
        combined = _touch_starved(combined, starved, batch, probs)
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


def _run_coupled(
    branches: Sequence[Branch], batch: Arguments, num_rows: int, device: torch.device
) -> dict[int, Any]:
    """Outputs for the whole batch of the branches whose BatchNorm needs it, checked."""
    whole = {}
    for b, branch in enumerate(branches):
        if branch.couples_samples():
            output = call_whole(branch, batch, num_rows)
            checks.check_outputs([output], [num_rows], [branch.label], device)
            whole[b] = output
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
        arguments = gather_arguments(
            plan,
            alone,
            [branches[b].arguments(batch) for b in alone],
            [branches[b].in_place for b in alone],
        )
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
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    sources, order = [leaves[i] for i in tensors], range(len(tensors))
    rows = movement.gather_rows(plan, sources, order, [branch] * len(tensors)) if tensors else []
    for i, gathered in zip(tensors, rows, strict=True):
        leaves[i] = gathered
    return tree.unflatten(leaves, spec)


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
    complement = sorting.route_complement(plan, learning.selected)
    rest = [b for b, count in enumerate(complement.counts) if count]
    with without_graph(), ExitStack() as stack:
        for b in rest:
            stack.enter_context(branches[b].frozen_statistics())
        return Rest(rest, _run_rows(branches, batch, complement, rest, whole), complement)


def _learn(
    branches: Sequence[Branch],
    batch: Arguments,
    plan: RoutingPlan,
    learning: Learning,
    own: list[int],
    outputs: list[Any],
    rest: Rest | None,
) -> tuple[list[Any], tree.Spec]:
    """Combines `outputs` so that the gate learns, also from the `rest` where there is one."""
    labels = [branches[b].label for b in own]
    rows = [plan.counts[b] for b in own]
    index, rest_starts, hidden = torch.where(learning.selected, plan.inverse, -1), [], None
    if rest is not None:

        def hidden() -> list[Tensor]:
            return [tensor for b in rest.branches for tensor in read_by(branches[b], batch)]

        outputs = outputs + rest.outputs
        labels += [branches[b].label for b in rest.branches]
        rows += [rest.plan.counts[b] for b in rest.branches]
        # The slots of the rest stand behind those of the plan.
        last = plan.order.shape[0]
        rest_starts = [rest.plan.starts[b] + last for b in rest.branches]
        index = torch.where(learning.selected, plan.inverse, rest.plan.inverse + last)
    columns, spec = checks.check_outputs(outputs, rows, labels, plan.order.device)
    starts, split = [plan.starts[b] for b in own], len(own)
    combined = [
        movement.combine_selected(
            plan, column[:split], starts, learning.probs, column[split:], rest_starts, index, hidden
        )
        for column in columns
    ]
    return combined, spec


def _combine(
    plan: RoutingPlan,
    column: Sequence[Any],
    own: Sequence[int],
    branches: Sequence[Branch],
    batch: Arguments,
    weights: Tensor | None,
) -> Any:
    single = len(own) == 1 and plan.counts[own[0]] == plan.num_rows
    if single and weights is None and plan.ranks == 1:
        return apart(column[0], [*batch.held(), *branches[own[0]].buffers_held()])
    starts = plan.host_header
    return movement.combine_rows(plan, column, [starts[b] for b in own], weights)


def read_by(branch: Branch, batch: Arguments) -> list[Tensor]:
    """What the outputs of a branch depend on: its parameters, and the tensors that it reads."""
    tensors = [*branch.parameters(), *branch.arguments(batch).held()]
    return [tensor for tensor in tensors if tensor.requires_grad]


def _touch_starved(
    combined: list[Any], starved: Sequence[Branch], batch: Arguments, probs: list[Tensor]
) -> list[Any]:
    """Parameters and inputs of branches nobody chose get zero gradients, as when masked.

    So an optimiser treats them alike in both modes, and distributed training finds every
    parameter used. `probs`: with the exact gradient of the gate even these zeros depend on them.
    """
    tensors = [tensor for branch in starved for tensor in read_by(branch, batch)]
    places = [i for i, leaf in enumerate(combined) if _carries_gradient(leaf)]
    if not tensors or not places:
        return combined
    sparse_ids = {
        id(part.weight)
        for branch in starved
        for part in branch.modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse
    }
    sparse = [id(tensor) in sparse_ids for tensor in tensors]
    hidden = (lambda: probs) if probs else None
    touched = movement.touch([combined[i] for i in places], tensors, sparse, hidden)
    for i, leaf in zip(places, touched, strict=True):
        combined[i] = leaf
    return combined


def _carries_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _equal_weights(like: Tensor, column: Sequence[Any]) -> Tensor:
    """[N, B], 1 / B each, as precise as the outputs are."""
    dtypes = [leaf.dtype.to_real() for leaf in column if _carries_gradient(leaf)]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return like.new_full(like.shape, 1 / like.shape[1], dtype=dtype)
