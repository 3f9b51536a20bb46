"""A plan by which some samples are worked on, and the others stay where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .plan import RoutingPlan


class SkippingPlan(RoutingPlan):
    """Of a top-1 plan with two branches, of which the first does nothing: one with three.

    0: the rows that skip, which `combine` does not read. 1: those that do not. 2: the whole batch
    as it lies, of which `combine` reads the rows that skip. `header` is still that of the first.

    Attributes:
        whole: int32 [N, 1], the slots of branch 2.
    """

    __slots__ = ("lent", "whole")

    def __init__(self, plan: RoutingPlan) -> None:
        size, (skips, _) = plan.num_rows, plan.counts
        checks.check_entries(3 * size)
        slots = torch.arange(size, 2 * size, dtype=torch.int32, device=plan.order.device)
        self.lent, self.whole = size, slots.view(size, 1)
        inverse = torch.where(plan.inverse < skips, self.whole, plan.inverse)
        header = [0, skips, size, 2 * size, *plan.faults]
        super().__init__(plan.order, inverse, plan.header, 3, header)

    def rows(self, branch: int) -> Tensor:
        """int64: the samples of `branch`, ascending."""
        if branch < 2:
            return super().rows(branch)
        return torch.arange(self.num_rows, device=self.order.device)

    def weighed_rows(self, plan: RoutingPlan, exact: bool) -> Tensor:
        """int32 [N, 2], what the weights of skipping and of running multiply, as slots.

        Args:
            plan: that this one was made of.
            exact: also where the weight is zero, else -1 there; what the rows that skip would have
                become stands behind the last slot of this plan.
        """
        own = self.inverse
        skips = own >= self.num_rows
        if exact:
            return torch.cat([self.whole, torch.where(skips, plan.inverse + self.end, own)], 1)
        return torch.where(torch.cat([skips, ~skips], 1), own, -1)

    @property
    def end(self) -> int:
        """The last slot, plus one."""
        return 2 * self.num_rows
