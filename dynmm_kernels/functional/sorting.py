"""Every way to make a plan: by choice, by the largest logit, by depth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import ops
from ..ops.schemas import FAULTS
from . import checks, ranges
from .deferred import DeferredPlan, has_values
from .plan import RoutingPlan, host_copy

FAULTY = -2  # an entry that no branch and not "no branch" is


@ranges.phase("route")
def route(selection: Tensor, num_branches: int) -> RoutingPlan:
    """Sorts samples by the branch they chose.

    Args:
        selection: integer [N] or [N, k], each value a branch in 0..B-1 or -1 for no branch; or
            bool [N, B], True where the sample takes the branch; [N] will do where B is 1.
        num_branches: B.

    Raises:
        TypeError: `selection` is neither integer nor bool.
        ValueError: wrong shape, more than 2**31 - 2 entries or 2**20 branches, or a value outside
            -1..B-1 (on a GPU it is raised when the counts are first read).

    Example:
        >>> from dynmm_kernels import route
        >>> plan = route(torch.tensor([1, 0, 1, -1]), 2)
        >>> plan.counts
        (1, 2)
        >>> plan.rows(1)
        tensor([0, 2])
    """
    given = selection
    plain = type(selection) is Tensor and selection.ndim == 1 and selection.dtype is torch.int64
    if not (
        plain
        and type(num_branches) is int
        and 1 <= num_branches <= checks.MAX_BRANCHES
        and selection.shape[0] < checks.MAX_ENTRIES
    ):
        checks.check_selection(selection, num_branches)
        if selection.dtype in checks.UNSIGNED:
            # A value past int64 wraps to a negative one: out of range, but never "no branch".
            wide = selection.long()
            selection = torch.where(wide < 0, num_branches, wide)
        elif selection.dtype == torch.bool and selection.ndim == 1:
            given = selection = selection.unsqueeze(1)
        if not has_values(selection):
            return DeferredPlan(selection, num_branches)
    elif is_dynamo_compiling():
        return DeferredPlan(selection, num_branches)
    order, inverse, header = ops.serving().route(selection, num_branches)
    if not selection.is_cpu:
        if selection.is_meta:
            return DeferredPlan(selection, num_branches)
        plan = RoutingPlan(order, inverse, header, num_branches)
        return plan.prefetch(partial(checks.check_choice, given))
    plan = RoutingPlan(order, inverse, header, num_branches, header.tolist())
    if plan.host_header[FAULTS]:
        checks.check_choice(given, plan)
    return plan


@ranges.phase("route")
def route_argmax(logits: Tensor) -> tuple[Tensor, RoutingPlan]:
    """Sorts samples by their largest logit (ties: the first branch), in one pass.

    Args:
        logits: floating [N, B].

    Returns:
        choice int64 [N], and the plan. Rows whose softmax is undefined (a nan, or no finite
        maximum) count as `plan.faults` and choose -1.
    """
    if not has_values(logits):
        choice = choose(logits)
        return choice, DeferredPlan(torch.where(choice < 0, FAULTY, choice), logits.shape[1])
    choice, order, inverse, header = ops.serving().route_argmax(logits)
    return choice, RoutingPlan(order, inverse, header, logits.shape[1])


def choose(logits: Tensor) -> Tensor:
    """int64 [N]: what `route_argmax` chooses, without a plan; -1 in an undefined row."""
    if not has_values(logits):
        return torch.where(logits.amax(1).isfinite(), logits.argmax(1), -1)
    return ops.serving().route_argmax(logits)[0]


@ranges.phase("route")
def route_unless(selection: Tensor, undefined: Tensor, num_branches: int) -> RoutingPlan:
    """The plan of an integer selection [N, k]; all of a row that is `undefined` [N] is faulty.

    The faults are left to `checks.check_faults`.
    """
    checks.check_entries(selection.numel())
    selection = torch.where(undefined.unsqueeze(1), FAULTY, selection)
    if not has_values(selection):
        return DeferredPlan(selection, num_branches)
    order, inverse, header = ops.kernels().route(selection, num_branches)
    return RoutingPlan(order, inverse, header, num_branches)


@ranges.phase("route")
def route_counted(selection: Tensor, counts: Sequence[int]) -> RoutingPlan:
    """The plan of int64 [N] whose rows per branch the host knows already: nothing waits for them.

    Every sample must have a branch.
    """
    if not has_values(selection):
        return DeferredPlan(selection, len(counts))
    order, inverse, header = ops.serving().route(selection, len(counts))
    return RoutingPlan(order, inverse, header, len(counts), _header(counts))


@ranges.phase("route")
def route_complement(plan: RoutingPlan, selected: Tensor) -> RoutingPlan:
    """The plan of all (sample, branch) that were not chosen, k = B.

    Its offsets follow from those of `plan`, so the host knows them without another copy.

    Args:
        plan: a plan in which no sample has a branch twice.
        selected: bool [N, B], what `plan` routes.

    Raises:
        ValueError: too many entries; the slots of both plans together are int32.
    """
    if not has_values(selected):
        return DeferredPlan(~selected, plan.num_branches)
    checks.check_entries(selected.numel() + plan.order.shape[0])
    order, inverse, header = ops.kernels().route(~selected, plan.num_branches)
    starts = [b * plan.num_rows - start for b, start in enumerate(plan.starts)]
    return RoutingPlan(order, inverse, header, plan.num_branches, [*starts, 0, -1])


@ranges.phase("route")
def route_descending(
    level: Tensor, num_levels: int, counts: Sequence[int] | None = None
) -> RoutingPlan:
    """Sorts samples by `level`, the highest first, stable in n: nested sets become prefixes.

    Args:
        level: int64 [N] in 0..num_levels-1. -1 (what `route_argmax` answers to an undefined row)
            counts as a fault; of other values ask `check_levels`.
        counts: samples of each level, where the host knows them: then nothing waits.

    Returns:
        A plan whose branch i is the level num_levels - 1 - i.
    """
    branch = num_levels - 1 - level
    if not has_values(level):
        return DeferredPlan(branch, num_levels)
    order, inverse, header = ops.kernels().route(branch, num_levels)
    known = None if counts is None else _header(counts[::-1])
    return RoutingPlan(order, inverse, header, num_levels, known)


def _header(counts: Sequence[int]) -> list[int]:
    """That of a plan without faults."""
    return [0, *itertools.accumulate(counts), 0, -1]


def at_least(plan: RoutingPlan, level: int) -> int:
    """How many samples of a plan from `route_descending` have that level or a higher one."""
    return plan.host_header[plan.num_branches - level]


def check_levels(plan: RoutingPlan, level: Tensor, name: str) -> None:
    """Raises ValueError for the first of the `level`s, called `name`, that is out of range."""
    if isinstance(plan, DeferredPlan):
        return
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


def route_flat(logits: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """`route_argmax` as order, inverse and the header on the host, without faults."""
    _, order, inverse, header = ops.serving().route_argmax(logits)
    host_header = header.tolist() if header.is_cpu else host_copy(header)()
    if host_header[FAULTS]:
        plan = RoutingPlan(order, inverse, header, logits.shape[1], host_header)
        checks.check_faults(logits, plan)
    return order, inverse, host_header
