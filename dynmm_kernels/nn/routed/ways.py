"""The one place that chooses how a batch runs: everywhere, routed, or routed the short way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from ...functional import tree
from ..adaptive import FORWARD, NO_GATE, Adaptive, hindrance, run_faster
from ..arguments import Arguments
from ..branch import Branch
from ..decision import Decision
from ..processes import TENSORS, may_shard
from ..tracing import holds_ops, refuse_routed
from .execution import Result, Routed, run_everywhere
from .flat import ALONE, bar_losses, run_flat
from .kept import Kept, RoutedApart, SteadyApart, run_whole
from .selecting import run_selecting
from .steady import Steady


class Ways(NamedTuple):
    """Who runs a batch."""

    everywhere: Callable[..., Result]
    selecting: Callable[..., Result]
    routed: Callable[..., Routed]
    steady: Callable[..., Routed]


SUMMED = Ways(run_everywhere, run_selecting, Routed, Steady)


def apart(kind: str, value: float) -> Ways:
    """For outputs that are kept apart."""
    kept = Kept(kind, value)
    return Ways(
        partial(run_whole, kept, False),
        partial(run_whole, kept, True),
        partial(RoutedApart, kept),
        partial(SteadyApart, kept),
    )


def run(
    fusion: Adaptive,
    branches: Sequence[Branch],
    batch: Arguments,
    decision: Decision,
    every: bool = False,
    ways: Ways = SUMMED,
) -> Result:
    """The output, and the rows that each branch processed.

    Args:
        every: starved branches run, too.
        ways: who runs it.
    """
    plan = decision.plan
    nothing = plan is not None and plan.traced and not holds_ops()
    if plan is None or fusion.execution == "masked" or (nothing and fusion.execution == "auto"):
        result = ways.everywhere(branches, batch, decision)
        if plan is not None:
            plan.verify()
        return result
    if nothing:
        refuse_routed(fusion)
    subset_norm = fusion.batch_norm == "subset"
    if plan.traced or every:
        return ways.steady(branches, batch, decision, subset_norm).run()
    if not plan.is_read:  # meanwhile, what needs no counts
        for branch in branches:
            branch.arguments(batch)
    counts = plan.counts
    if not any(counts):
        return ways.everywhere(branches, batch, decision)

    def routed() -> Result:
        return ways.routed(branches, batch, decision, subset_norm).run()

    if fusion.execution != "auto":
        return routed()
    reason = _settled(fusion, branches, batch, decision)
    if reason is not None:
        fusion.chooser.last = reason
        return routed()

    result = run_faster(
        fusion.chooser,
        (decision.grad or NO_GATE) if torch.is_grad_enabled() else FORWARD,
        plan.num_rows,
        counts,
        plan.order,
        (routed, lambda: ways.selecting(branches, batch, decision)),
        lambda result: (tree.flatten(result[0])[0], batch.tensors()),
    )
    bar_losses(fusion.chooser, result[0])
    return result


def _settled(
    fusion: Adaptive, branches: Sequence[Branch], batch: Arguments, decision: Decision
) -> str | None:
    """Why the batch must be routed; None: it may also run masked."""
    plan = decision.plan
    assert plan is not None
    if fusion.chooser.barred is not None:
        return fusion.chooser.barred
    if len(branches) == 1 or (not torch.is_grad_enabled() and plan.num_rows in plan.counts):
        return ALONE
    subset = fusion.batch_norm == "subset"
    for branch in branches:
        if branch.replay is not None:
            return "its branches are replayed"
        if subset and branch.couples_samples():
            return "BatchNorm on the samples of a branch is asked for"
    if not batch.plain:
        for leaf in batch.leaves:
            if isinstance(leaf, tree.Lazy):
                return "masked execution would fetch all of a Lazy modality"
    return hindrance()


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
        or state["starved"] != "skip"
        or state["outputs"] != "sum"
        or is_dynamo_compiling()
        or (TENSORS in sys.modules and may_shard())
    ):
        return None
    modules, chooser = state["_modules"], state["chooser"]
    if modules["gate"] is None:
        return None
    branches = [*modules["branches"]._modules.values()]
    captured = state.get("captured") is not None
    if captured or state["execution"] == "routed":
        chooser = None
    return run_flat(modules["gate"], branches, inputs, chooser)
