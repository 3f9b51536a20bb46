"""The functional floor for nested sets: sorted by level, every set is a prefix of the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import autograd, learning, ops
from .functional import widest_dtype
from .plan import RoutingPlan


def route_descending(level: Tensor, num_levels: int) -> RoutingPlan:
    """Sorts samples by `level`, the highest first, stable in n: nested sets become prefixes.

    Args:
        level: int64 [N] in 0..num_levels-1. -1 (what `route_argmax` answers to an undefined row)
            counts as a fault; of other values ask `check_levels`.

    Returns:
        A plan whose branch i is the level num_levels - 1 - i.
    """
    order, inverse, header = ops.kernels().route(num_levels - 1 - level, num_levels)
    return RoutingPlan(order, inverse, header, num_levels)


def check_levels(plan: RoutingPlan, level: Tensor, name: str) -> None:
    """Raises ValueError for the first of the `level`s, called `name`, that is out of range."""
    faults, _ = plan.faults
    if faults or plan.starts[-1] != plan.num_rows:  # a level too high looks like "no branch"
        top = plan.num_branches - 1
        wrong = ((level < 0) | (level > top)).nonzero()[:, 0].tolist()
        raise ValueError(
            f"{name} must be in 0..{top}; got {level[wrong[0]].item()} in row {wrong[0]} "
            f"({len(wrong)} such in all)"
        )


def permutation(order: Tensor) -> RoutingPlan:
    """The plan of one branch that takes every sample, in the order int32 [N] given."""
    size = order.shape[0]
    slots = torch.arange(size, dtype=torch.int32, device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order.long(), slots)
    header = order.new_zeros(4)
    header[1].fill_(size)
    header[3].fill_(-1)
    return RoutingPlan(order, inverse.view(size, 1), header, 1, [0, size, 0, -1])


def gather_slots(
    plan: RoutingPlan,
    sources: Sequence[Tensor],
    index: Sequence[int],
    starts: Sequence[int],
    stops: Sequence[int],
) -> list[Tensor]:
    """For each i: the rows of sources[index[i]] in the slots starts[i]..stops[i]; one call."""
    return autograd.gather(plan, [*sources], index, [*starts], [*stops], None)


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
        hidden: as in `functional.combine_selected`.
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
