"""How hard weights, probabilities or logits become a decision, in the mode of the module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..functional import checks, sorting
from ..functional.plan import RoutingPlan
from .decision import Decision
from .rules import Rule
from .settings import Settings

Sort = Callable[[Tensor], tuple[Tensor, RoutingPlan]]


def by_depth(rule: Rule, num_depths: int) -> Sort:
    """The depth that the rule chooses, and samples sorted by it, the deepest first."""

    def sort(given: Tensor) -> tuple[Tensor, RoutingPlan]:
        depth = rule.choose(given)
        return depth, sorting.route_descending(depth, num_depths)

    return sort


def decide(
    module: Settings,
    rule: Rule,
    given: Tensor,
    sort: Sort,
    *,
    learns: bool,
    reports: bool,
    dense: bool = False,
    giver: str = "the gate",
    wanted: str | None = None,
) -> Decision:
    """What a module is to do.

    Args:
        rule: for what was `given`, [N, B].
        sort: gives the choice and its plan.
        learns: whether what was given gets a gradient.
        reports: whether somebody reads the probabilities.
        dense: whether everything runs, weighted by probabilities.
        giver, wanted: for messages.
    """
    wanted = wanted or rule.wanted
    if dense:
        checks.check_defined(given, rule.undefined(given), giver, wanted)
        return Decision(rule, probs=rule.probs(given, module.temperature))
    choice, plan = sort(given)
    plan.prefetch(partial(checks.check_faults, given, gate=giver, wanted=wanted))
    probs = rule.probs(given, module.temperature) if learns or reports else None
    return Decision(rule, choice, plan, probs, grad=module.gate_grad if learns else None)
