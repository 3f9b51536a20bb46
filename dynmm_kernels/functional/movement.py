"""Rows to their branches and back: gather, combine, and what nested sets need instead."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import autograd, checks, learning, ranges, traced, tree
from .filled import FilledPlan
from .parts import Selection, split_parts
from .plan import RoutingPlan


def gather(plan: RoutingPlan, tensors: Any, select: Selection | None = None) -> list[Any]:
    """Each branch's own rows.

    Args:
        plan: from `route`.
        tensors: a tensor [N, ...] or a pytree of such; None, numbers, 0-dim tensors and
            `Shared` tensors pass through.
        select: what each branch reads of a list, tuple or dict of parts: for every branch a
            position or key, or a sequence of these. Nothing else moves. None: all of it.

    Returns:
        A list over the branches: the same pytree with leaves [n_b, ...], or what was selected of
        it: the part itself for a bare key, else a list, tuple or dict of parts. Memory format is
        kept.

    Raises:
        ValueError: a tensor's dim 0 is not N, or it is on another device than the plan; or a
            part that is not there.

    Example:
        >>> from dynmm_kernels import gather, route
        >>> plan = route(torch.tensor([1, 0, 1]), 2)
        >>> text, image = torch.tensor([10, 20, 30]), torch.tensor([1, 2, 3])
        >>> gather(plan, text)
        [tensor([20]), tensor([10, 30])]
        >>> gather(plan, [text, image], select=[[0], [0, 1]])
        [[tensor([20])], [tensor([10, 30]), tensor([1, 3])]]
    """
    if select is not None:
        return _gather_parts(plan, tensors, select)
    leaves, spec = tree.flatten(tensors)
    rows = _rows_of(plan, leaves)
    branches = range(plan.num_branches)
    sources = [leaves[i] for i in rows]
    index = [i for _ in branches for i in range(len(rows))]
    moved = [b for b in branches for _ in rows]
    gathered = iter(gather_rows(plan, sources, index, moved) if moved else ())
    results = []
    for _ in branches:
        own = [*map(_unwrapped, leaves)]
        for i in rows:
            own[i] = next(gathered)
        results.append(tree.unflatten(own, spec))
    return results


def combine(
    plan: RoutingPlan, outputs: Sequence[Any], weights: Tensor | None = None, *, like: Any = None
) -> Any:
    """Puts the branches' outputs back in sample order: the transpose of `gather`.

    out[n] = sum_j weights[n, j] * outputs[branch(n, j)][row], summed in rank order in fp32 (fp64
    for fp64), zeros for a sample with no branch.

    Args:
        plan: the plan the rows were gathered with.
        outputs: one pytree per branch, leaves [n_b, ...]; None where the branch has no rows.
        weights: floating [N, k], or [N] where k is 1. Of a plan from a bool mask k is B, and
            weights[n, b] multiplies branch b; those of branches that are False are not read.
        like: what an output looks like, where no branch has rows and every output is None: a
            pytree of tensors with any number of rows, on any device (meta, too). The result are
            zeros [N, ...] of these shapes and dtypes.

    Raises:
        ValueError, TypeError: an output whose structure, row count, shape or dtype differs; the
            message names the branch.

    Example:
        >>> from dynmm_kernels import combine, gather, route
        >>> plan = route(torch.tensor([1, 0, 1]), 2)
        >>> low, high = gather(plan, torch.tensor([10, 20, 30]))
        >>> combine(plan, [low, -high])
        tensor([-10,  20, -30])
    """
    if len(outputs) != plan.num_branches:
        raise ValueError(
            f"combine: wanted one output per branch, {plan.num_branches}; got {len(outputs)}"
        )
    counts, begin = plan.counts, plan.host_header
    active = [b for b, output in enumerate(outputs) if output is not None]
    given = [outputs[b] for b in active]
    rows, starts = [counts[b] for b in active], [begin[b] for b in active]
    if sum(rows) < begin[plan.num_branches]:
        b = next(b for b, count in enumerate(counts) if count and outputs[b] is None)
        raise ValueError(f"combine: branch {b} has {counts[b]} rows but no output")
    device = plan.order.device
    if not active:
        return tree.zeros_like(like, plan.num_rows, device)
    if checks.single_tensors_fit(given, rows, device):
        return combine_rows(plan, given, starts, weights)
    names = [f"branch {b}" for b in active]
    columns, spec = checks.check_outputs(given, rows, names, device, losses=False)
    combined = [combine_rows(plan, column, starts, weights) for column in columns]
    return tree.unflatten(combined, spec)


def _gather_parts(plan: RoutingPlan, tensors: Any, select: Selection) -> list[Any]:
    """`gather` of what each branch selects; what it names twice moves once."""
    leaves, owns = split_parts(tensors, select, plan.num_branches)
    used = sorted({i for places, _ in owns for i in places})
    leaves = [leaves[i] for i in used]
    rows = _rows_of(plan, leaves)
    moves = [(b, i) for b, (places, _) in enumerate(owns) for i in rows if used[i] in places]
    sources, place_of = [leaves[i] for i in rows], {i: at for at, i in enumerate(rows)}
    index, branches = [place_of[i] for _, i in moves], [b for b, _ in moves]
    gathered = gather_rows(plan, sources, index, branches) if moves else ()
    parts = dict(zip(((b, used[i]) for b, i in moves), gathered, strict=True))
    whole = {i: _unwrapped(leaf) for i, leaf in zip(used, leaves, strict=True)}
    return [
        tree.unflatten([parts.get((b, i), whole[i]) for i in places], spec)
        for b, (places, spec) in enumerate(owns)
    ]


def _rows_of(plan: RoutingPlan, leaves: list[Any]) -> list[int]:
    """Positions of what moves, after checking that it can."""
    rows, _, _ = tree.find_rows(leaves, "gather", plan.num_rows)
    for i in rows:
        checks.check_source(leaves[i], plan)
    return rows


def _unwrapped(leaf: Any) -> Any:
    return leaf.tensor if isinstance(leaf, tree.Shared) else leaf


@ranges.phase("gather")
def gather_rows(
    plan: RoutingPlan,
    sources: list[Tensor],
    index: Sequence[int],
    branches: Sequence[int],
) -> list[Tensor]:
    """For each i: the rows of sources[index[i]] that go to branches[i]; all in one call."""
    starts = plan.host_header
    begin = [starts[b] for b in branches]
    end = [starts[b + 1] for b in branches]
    if type(plan) is RoutingPlan:
        return autograd.gather(plan, sources, index, begin, end, None)
    return _take(plan, sources, index, begin, end)


@ranges.phase("combine")
def combine_rows(
    plan: RoutingPlan, outputs: Sequence[Any], starts: list[int], weights: Tensor | None = None
) -> Any:
    """One leaf of every active branch, back in sample order."""
    first = outputs[0]
    if not isinstance(first, Tensor):
        return first
    outputs = same_dtype(outputs)
    if weights is None and plan.ranks == 1 and not plan.traced:
        return autograd.combine(plan, outputs, starts, None)
    if first.dtype == torch.bool and (weights is not None or plan.ranks > 1):
        raise TypeError("combine: bool outputs cannot be summed; return them as integers")
    if weights is not None:
        weights = checks.check_weights(weights, plan, first.dtype)
    if plan.traced:
        return traced.put([*outputs], starts, plan.order, plan.inverse, weights)
    return autograd.combine(plan, outputs, starts, weights)


def _take(
    plan: RoutingPlan,
    sources: list[Tensor],
    index: Sequence[int],
    starts: list[int],
    stops: list[int],
) -> list[Tensor]:
    """`autograd.gather` for plans that are filled or traced."""
    filled = plan.filled if isinstance(plan, FilledPlan) else plan.order
    if plan.traced:
        parts = plan.order, filled, plan.inverse
        return traced.take(sources, [*index], starts, stops, *parts)
    return autograd.take(plan, filled, sources, index, starts, stops)


@ranges.phase("combine")
def combine_selected(
    plan: RoutingPlan,
    rows: Sequence[Any],
    starts: list[int],
    count: int,
    probs: Tensor,
    index: Tensor,
    hidden: learning.Hidden | None,
) -> Any:
    """combine_rows of the first `count` leaves, which also sends the gate its gradient.

    d loss / d probs[n, m] = <d loss / d out[n], row(index[n, m])>, out of all leaves, at the slots
    `starts`; -1: no row, no gradient. The rows themselves get no gradient on this way: in the
    forward pass the weight of a selected branch is one, of any other zero.

    `hidden`: what the leaves behind the first `count` were computed from without a graph. Second
    derivatives with respect to these tensors are refused; where there are none, all are exact.
    """
    first, own = rows[0], starts[:count]
    if not isinstance(first, Tensor):
        return first
    if not carries_gradient(first):
        return combine_rows(plan, rows[:count], own)
    outputs = same_dtype(rows[:count])
    others = [other.to(outputs[0].dtype) for other in rows[count:]]
    if plan.traced:
        parts = probs, index, plan.order, plan.inverse
        return traced.put_selected([*outputs, *others], starts, count, *parts)
    return learning.CombineSelected.apply(
        plan, own, starts[count:], index, count, hidden, probs, *outputs, *others
    )


def touch(
    leaves: Sequence[Any],
    tensors: Iterable[Tensor],
    hidden: learning.Hidden | None = None,
    sparse: Container[int] = (),
) -> list[Any]:
    """The leaves, with `tensors` in their graph: these get gradients of exactly zero, not None.

    So an optimiser treats them as when masked, and distributed training finds each of them used.

    Args:
        leaves: outputs that nobody else holds, none of them a leaf of a graph.
        tensors: only those that require grad are touched.
        hidden: what the zeros depend on in masked execution, where a derivative of them is refused.
        sparse: ids of the tensors whose zeros are sparse.
    """
    leaves, wanting = [*leaves], [tensor for tensor in tensors if tensor.requires_grad]
    places = [i for i, leaf in enumerate(leaves) if carries_gradient(leaf)]
    if not (wanting and places and torch.is_grad_enabled()):
        return leaves
    with torch._C.DisableTorchFunctionSubclass():  # of a subclass even a clone is a view
        outputs = [leaves[i].clone() if leaves[i]._is_view() else leaves[i] for i in places]
    zeros = [id(tensor) in sparse for tensor in wanting]
    touched = learning.Touch.apply(len(outputs), zeros, hidden, *outputs, *wanting)
    for i, leaf in zip(places, touched, strict=True):
        leaves[i] = leaf
    return leaves


def carries_gradient(leaf: Any) -> bool:
    """Whether it is a tensor that may have a gradient."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def gather_flat(
    order: Tensor, tensors: Sequence[Tensor], starts: list[int], stops: list[int]
) -> list[Sequence[Tensor]]:
    """For each range of slots of a top-1 order: its rows of every tensor. Records no graph."""
    size = len(tensors)
    move = ops.serving().gather_rows
    if size == 1:
        return [(rows,) for rows in move([*tensors] * len(starts), starts, stops, order, 1)]
    starts = [start for start in starts for _ in range(size)]
    stops = [stop for stop in stops for _ in range(size)]
    rows = move([*tensors] * (len(starts) // size), starts, stops, order, 1)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def combine_flat(inverse: Tensor, outputs: Sequence[Any], starts: list[int]) -> Any:
    """Tensors of one dtype, by slots of a top-1 plan, in sample order. Records no graph."""
    return ops.serving().combine_rows(outputs, starts, inverse)


def widest_dtype(outputs: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds all: under autocast branches may end in different ones."""
    dtype = outputs[0].dtype
    for output in outputs:
        if output.dtype is not dtype:
            dtype = torch.promote_types(dtype, output.dtype)
    return dtype


def same_dtype(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """All in `widest_dtype`."""
    dtype = widest_dtype(outputs)
    for output in outputs:
        if output.dtype is not dtype:
            return [output.to(dtype) for output in outputs]
    return outputs


@ranges.phase("gather")
def gather_slots(
    plan: RoutingPlan,
    sources: Sequence[Tensor],
    index: Sequence[int],
    starts: Sequence[int],
    stops: Sequence[int],
) -> list[Tensor]:
    """For each i: the rows of sources[index[i]] in the slots starts[i]..stops[i]; one call."""
    if type(plan) is RoutingPlan:
        return autograd.gather(plan, [*sources], index, [*starts], [*stops], None)
    return _take(plan, [*sources], index, [*starts], [*stops])


@ranges.phase("combine")
def fuse_prefix(
    head: Tensor | None,
    tail: Tensor | None,
    fused: Tensor | None,
    rest: Tensor | None,
    weights: Tensor,
    exact: bool,
    hidden: learning.Hidden | None,
) -> Tensor:
    """[N, ...]: the rows `fused` and behind them `tail`; the gate learns from it.

    d loss / d weights[n] = (<d loss / d out[n], own row n>, <d loss / d out[n], fused row n>).

    Args:
        head, tail: the samples' own rows, [n, ...] and [N-n, ...]; None where there are none.
        fused: [n, ...], what `head` is fused to.
        rest: [r, ...], what the first r rows of `tail` would be fused to; without a graph.
        weights: [N, 2], of own and fused rows. Their values are taken to be (0, 1) for the first n
            samples and (1, 0) behind them.
        exact: also give a gradient to the weights that are 0.
        hidden: as in `combine_selected`.
    """
    parts = [part for part in (fused, tail) if part is not None]
    others = [part for part in (head, rest) if exact and part is not None]
    dtype, size = widest_dtype(parts), weights.shape[0]
    slot = torch.arange(size, dtype=torch.int32, device=weights.device)
    other = slot + size if exact else torch.full_like(slot, -1)
    active = slot < (0 if fused is None else fused.shape[0])
    index = torch.stack([torch.where(active, other, slot), torch.where(active, slot, other)], 1)
    blocks = [part.to(dtype) for part in (*parts, *others)]
    return learning.FusePrefix.apply(index, len(parts), hidden, weights, *blocks)
