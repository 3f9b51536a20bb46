"""Masked execution that leaves out what was not chosen, where `auto` finds it the faster way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...functional import checks, movement, selecting, tree
from ..arguments import Arguments
from ..branch import Branch
from ..decision import Decision
from ..rules import as_column
from .execution import Result


def run_selecting(branches: Sequence[Branch], batch: Arguments, decision: Decision) -> Result:
    """Every branch on every sample; of each sample the outputs of its branches.

    As `run_everywhere`, gradients included, but what was not chosen may be nan: the output does not
    show it.
    """
    plan = decision.plan
    assert plan is not None
    num_rows = plan.num_rows
    rows_run = (num_rows,) * len(branches)
    outputs = [branch.call_whole(batch, num_rows) for branch in branches]
    if checks.single_tensors_fit(outputs, rows_run, plan.order.device):
        columns, spec = [tuple(outputs)], None
    else:
        labels = [branch.label for branch in branches]
        columns, spec = checks.check_outputs(outputs, rows_run, labels, plan.order.device)
    weighted = decision.rank_weights is not None
    weights = decision.multipliers() if weighted or decision.grad is not None else None
    chosen: Tensor | None = None  # where every sample chose one branch the plan tells it faster
    if plan.ranks > 1 or sum(plan.counts) < num_rows:
        chosen = decision.selected if weights is None else weights.detach() != 0

    def leaf(column: Sequence[Any]) -> Any:
        first = column[0]
        if not isinstance(first, Tensor):
            return first
        if not movement.carries_gradient(first) or not first.ndim:
            return decision.blend(column, decision.selected if weights is None else weights)
        if weighted:
            assert weights is not None
            dtype = movement.widest_dtype(column)
            column = [as_column(weights[:, b], y) * y for b, y in enumerate(column)]
        column = movement.same_dtype(column)

        def select(out: Tensor | None = None) -> Tensor:
            if chosen is None:
                return selecting.select_sorted(column, plan.inverse, plan.host_header, out)
            return selecting.select(column, chosen, plan.ranks == 1, out)

        if weighted:
            return select().to(dtype)
        return select() if weights is None else selecting.select_learning(column, weights, select)

    return tree.unflatten([leaf(column) for column in columns], spec), rows_run
