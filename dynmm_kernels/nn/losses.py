"""Losses that make a gate care about what its choices cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .routing import Routing, mean_cost

Costs = Sequence[float]


def resource_loss(
    routing: Routing | Sequence[Routing],
    costs: Costs | Sequence[Costs | None] | None = None,
    budget: float | None = None,
    reduction: str = "sum",
) -> Tensor:
    """What the gates' choices cost per sample, or its excess over a budget.

    The mean over samples of sum_b g_b * C_b (DynMM eq. 1); of several fusions, the sum over them
    (eq. 2: cells of a network). A `DepthRouting` covers all cells of its stack at once. The
    gradient reaches the gates through `routing.weights`. Multiply by the strength wanted; with
    `costs=[0, 1]` this is the `reg * mean(weight[:, 1])` of DynMM's code.

    Args:
        routing: from `fusion(..., return_routing=True)`; or several, of fusions in one model.
        costs: C_b, one number per branch; of several fusions, one such list (or None) each.
            Default: the costs given to the branches.
        budget: in the unit of the costs; the loss is then max(0, cost - budget).
        reduction: over the branches: "sum"; or "mean", which divides by their number, as the
            code of the fusion-level DynMM does. The budget is compared with what comes of that.

    Returns:
        A scalar in the unit of the costs.

    Raises:
        ValueError: costs are missing, or not one per branch; an unknown reduction.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"resource_loss: reduction must be 'sum' or 'mean'; got {reduction!r}")
    several = isinstance(routing, (list, tuple))
    routings = [*routing] if several else [routing]  # type: ignore[misc]
    for one in routings:
        if not isinstance(one, Routing):
            raise TypeError(
                f"resource_loss: wanted a Routing, from fusion(..., return_routing=True), or a "
                f"list of them; got {type(one).__name__}"
            )
    tables = ([None] * len(routings) if costs is None else [*costs]) if several else [costs]
    if not routings or len(tables) != len(routings):
        raise ValueError(
            f"resource_loss: wanted one list of costs per routing, and at least one; got "
            f"{len(tables)} for {len(routings)} routings"
        )
    each = [
        _cost(one, table, reduction)  # type: ignore[arg-type]
        for one, table in zip(routings, tables, strict=True)
    ]
    total = torch.stack(each).sum()
    return total if budget is None else (total - budget).clamp_min(0)


def _cost(routing: Routing, costs: Costs | None, reduction: str) -> Tensor:
    if isinstance(costs, (int, float)):
        raise ValueError(f"resource_loss: wanted a list of costs for every routing; got {costs}")
    costs = routing.costs if costs is None else costs
    if costs is None:
        raise ValueError("resource_loss: give costs, or construct every Branch with a cost")
    if any(isinstance(cost, str) for cost in costs):
        raise TypeError(f"resource_loss: costs must be numbers, one per branch; got {costs!r}")
    weights = routing.weights
    if len(costs) != weights.shape[1]:
        raise ValueError(
            f"resource_loss: wanted one cost per branch, {weights.shape[1]}; got {len(costs)}"
        )
    cost = mean_cost(weights, costs)
    return cost / weights.shape[1] if reduction == "mean" else cost
