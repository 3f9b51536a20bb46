"""The one place that chooses how a batch runs: everywhere, routed, or routed the short way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..arguments import Arguments
from ..branch import Branch
from ..decision import Decision
from ..settings import Settings
from .execution import Result, Routed, run_everywhere
from .flat import run_flat


def run(
    settings: Settings, branches: Sequence[Branch], batch: Arguments, decision: Decision
) -> Result:
    """The output, and the rows that each branch processed."""
    plan = decision.plan
    if plan is None or settings.execution == "masked":
        result = run_everywhere(branches, batch, decision)
        if plan is not None:
            plan.host_header  # noqa: B018 (what is at fault is raised)
        return result
    if not plan.is_read:  # meanwhile, what needs no counts
        for branch in branches:
            branch.arguments(batch)
    if not any(plan.counts):
        return run_everywhere(branches, batch, decision)
    return Routed(branches, batch, decision, settings.batch_norm == "subset").run()


def run_short(state: dict[str, Any], inputs: tuple[Any, ...]) -> Any:
    """The output, without a graph; None where the general way must be taken.

    `state`: the `__dict__` of a RoutedFusion, past Module.__getattr__, which is slow.
    """
    if (
        state["training"]
        or state["select"] != 1
        or state["execution"] not in ("auto", "routed")
        or state["noise"] == "gumbel_always"
        or state["gate_returns"] != "logits"
    ):
        return None
    modules = state["_modules"]
    return run_flat(modules["gate"], [*modules["branches"]._modules.values()], inputs)
