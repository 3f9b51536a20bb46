"""A layer on the samples that keep it; the others are read where they lie."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...functional import checks, movement, tree
from ...functional.skipping import SkippingPlan
from ..arguments import gather_arguments
from ..branch import Branch, forward_only
from ..routed.execution import Result, Routed


def _first(x: Any, *_: Any, **__: Any) -> tuple[Any]:
    return (x,)


SKIP = Branch(nn.Identity(), inputs=_first, name="skip", cost=0.0).eval()  # it keeps nothing


class Skipping(Routed):
    """Branch 0 is `SKIP`, whose rows are not gathered; branch 1 is the layer."""

    __slots__ = ()

    def run(self) -> Result:
        skip, layer = self.branches
        skips, runs = self.plan.counts
        if not skips:
            output, rows_run = super().run()
            return self._like_input(output), rows_run
        if self.whole or not runs:
            return super().run()
        decision, size, exact = self.decision, self.plan.num_rows, self.decision.exact
        plan, own = SkippingPlan(self.plan), layer.arguments(self.batch)
        followed: list[Any] = []
        if exact:  # before a graph holds memory
            with forward_only([layer]):
                (arguments,) = gather_arguments(plan, [0], [own], [layer.in_place])
                followed = [layer.call(arguments, own.rows_at_hand())]
        parts = [own, skip.arguments(self.batch)]
        arguments, (x,) = gather_arguments(plan, [1, 2], parts, [layer.in_place, False])
        outputs = [layer.call(arguments, own.rows_at_hand()), x, *followed]
        rows, starts = [runs, size, skips][: len(outputs)], [skips, size, plan.end][: len(outputs)]
        columns, spec = [tuple(outputs)], None
        if not checks.single_tensors_fit(outputs, rows, plan.order.device):
            labels = [layer.label, "the input", layer.label][: len(outputs)]
            columns, spec = checks.check_outputs(outputs, rows, labels, plan.order.device)
        if decision.grad is None:
            combined = [movement.combine_rows(plan, column, starts) for column in columns]
            return tree.unflatten(combined, spec), (skips, runs)
        index, hidden = plan.weighed_rows(self.plan, exact), self._hidden if exact else None
        assert decision.probs is not None  # the gate learns through them
        combined = [
            movement.combine_selected(plan, column, starts, 2, decision.probs, index, hidden)
            for column in columns
        ]
        return tree.unflatten(combined, spec), (size, size) if exact else (skips, runs)

    def _hidden(self) -> list[Tensor]:
        """What the rows that follow were computed from without a graph."""
        return self.branches[1].read_from(self.batch)

    def _like_input(self, output: Any) -> Any:
        """As where somebody skips: checked against the input, and under autocast as wide."""
        both, size = [output, self.batch.selected[0]], self.plan.num_rows
        labels = [self.branches[1].label, "the input"]
        columns, spec = checks.check_outputs(both, [size, size], labels, self.plan.order.device)
        wide = [
            own.to(movement.widest_dtype([own, x])) if movement.carries_gradient(own) else own
            for own, x in columns
        ]
        return tree.unflatten(wide, spec)
