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
    num_rows = decision.num_rows
    outputs = [branch.call_whole(batch, num_rows) for branch in branches]
    selected = select_outputs(outputs, [branch.label for branch in branches], decision)
    return selected, (num_rows,) * len(outputs)


def select_outputs(
    outputs: Sequence[Any], labels: Sequence[str], decision: Decision, by_branch: bool = True
) -> Any:
    """Of each sample what was chosen of the outputs, one for every column of the weights.

    Args:
        labels: of the outputs, for messages.
        by_branch: the outputs are those of the branches of the plan, in their order.
    """
    plan = decision.plan
    assert plan is not None
    rows = (plan.num_rows,) * len(outputs)
    if checks.single_tensors_fit(outputs, rows, plan.order.device):
        columns, spec = [tuple(outputs)], None
    else:
        columns, spec = checks.check_outputs(outputs, rows, labels, plan.order.device)
    weighted = decision.rank_weights is not None
    weights = decision.multipliers() if weighted or decision.grad is not None else None
    chosen: Tensor | None = None  # where every sample chose one branch the plan tells it faster
    if not by_branch or plan.ranks > 1 or sum(plan.counts) < plan.num_rows:
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

    return tree.unflatten([leaf(column) for column in columns], spec)
