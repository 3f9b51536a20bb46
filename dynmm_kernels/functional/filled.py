"""Plans that give every branch rows, so that each can be called in every call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..ops.schemas import FAULTS
from .deferred import read_headers
from .plan import RoutingPlan

# A compiler that is not told a number of rows takes it for neither 0 nor 1; so a graph that is to
# serve all must not meet these.
LEAST = 2


class FilledPlan(RoutingPlan):
    """A plan whose branches have some rows at least: copies of the first sample where they lack.

    Nobody reads what becomes of those, and they get no gradient: `inverse` does not name their
    slots, and in `order` their entries name no row.

    Attributes:
        filled: `order`, but the first sample where a row is a copy.
    """

    __slots__ = ("filled", "traced")

    def __init__(self, *parts: Tensor, host_header: list[int], traced: bool) -> None:
        order, inverse, self.filled = parts
        super().__init__(order, inverse, order, len(host_header) - 3, host_header)
        self.traced = traced

    def rows(self, branch: int) -> Tensor:
        """int64: the samples of `branch`, and the copies."""
        return self.filled[self.starts[branch] : self.starts[branch + 1]].long() // self.ranks


def fill(plans: Sequence[RoutingPlan], least: int) -> list[FilledPlan]:
    """Each of the plans with `least` rows for every branch; the host reads all counts at once.

    A call that has one sample may have fewer rows than that; all are copies then.
    """
    parts = [_sort(plan, least) for plan in plans]
    traced = plans[0].traced
    if traced:
        headers = read_headers([header for *_, header in parts], least)
    else:
        headers = [_grown(plan, least) for plan in plans]
    return [
        FilledPlan(*three, host_header=header, traced=traced)
        for (*three, _), header in zip(parts, headers, strict=True)
    ]


def _sort(plan: RoutingPlan, least: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, inverse, filled and header, sorted again with the copies behind the entries."""
    slots, offsets, device = plan.inverse, plan.offsets, plan.inverse.device
    branches = torch.arange(plan.num_branches, dtype=torch.int32, device=device)
    branch = torch.bucketize(slots, offsets[1:], right=True, out_int32=True)
    lacking = least - offsets.diff().unsqueeze(1)
    copies = torch.where(torch.arange(least, device=device) < lacking, branches.unsqueeze(1), -1)
    selection = torch.cat([torch.where(slots < 0, -1, branch).flatten(), copies.flatten()])
    order, every, header = ops.kernels().route(selection, plan.num_branches)
    entries = slots.shape[0] * slots.shape[1]
    inverse = every.narrow(0, 0, entries).view(slots.shape)
    filled = torch.where(order < entries, order, 0)
    return order, inverse, filled, torch.cat([header[:FAULTS], plan.header[FAULTS:]])


def _grown(plan: RoutingPlan, least: int) -> list[int]:
    counts = [max(count, least) for count in plan.counts]
    return [0, *itertools.accumulate(counts), *plan.faults]
