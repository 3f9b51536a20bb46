"""Every branch in every call: one graph for all splits, and ranks that stay in step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...functional import sorting
from ...functional.filled import LEAST, fill
from ...functional.plan import RoutingPlan
from ..arguments import Arguments
from ..branch import Branch, forward_only
from ..decision import Decision, sum_losses
from .execution import Rest, Routed


class Steady(Routed):
    """`Routed` that calls each branch on at least so many rows, copies of a sample where it lacks.

    For the exact gradient of the gate it calls each a second time, on the samples of the others.
    What becomes of the copies nobody reads, and they get a gradient of zero; so where a slope is
    infinite there, the gradient is nan, as in masked execution.
    """

    __slots__ = ("others",)

    steady = True
    others: RoutingPlan

    def __init__(
        self,
        branches: Sequence[Branch],
        batch: Arguments,
        decision: Decision,
        subset_norm: bool,
    ) -> None:
        assert decision.plan is not None
        self.branches = branches
        self.batch = batch
        self.decision = decision
        self.own = [*range(len(branches))]
        plans = [decision.plan]
        if decision.exact:
            plans.append(sorting.route_complement(decision.plan, decision.selected))
        self.plan, *others = fill(plans, LEAST)
        if others:
            (self.others,) = others
        self.whole = {} if subset_norm else self._run_coupled()

    def _total(self, losses: Sequence[Tensor]) -> Tensor:
        return sum_losses(losses, self.decision.chosen)

    def _are_mirrored(self) -> bool:
        return False

    def _run_rest(self) -> Rest:
        with forward_only(self.branches):
            outputs = self._run_rows(self.others, self.own)
        starts = [*self.others.starts[:-1]]
        return Rest(self.own, outputs, [*self.others.counts], starts, self.others.inverse)
