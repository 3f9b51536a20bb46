"""Losses that make a gate care about what its choices cost."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .nn.routing import Routing


def resource_loss(
    routing: Routing, costs: Sequence[float] | None = None, budget: float | None = None
) -> Tensor:
    """Mean over samples of sum_b g_b * C_b (DynMM eq. 1), or its excess over a budget.

    The gradient reaches the gate through `routing.weights`. Multiply by the strength wanted;
    with `costs=[0, 1]` this is the `reg * mean(weight[:, 1])` of DynMM's code.

    Args:
        routing: from `fusion(..., return_routing=True)`.
        costs: C_b, one number per branch; default: the costs given to the branches.
        budget: in the unit of the costs; the loss is then max(0, cost - budget).

    Returns:
        A scalar in the unit of the costs.

    Raises:
        ValueError: costs are missing, or not one per branch.
    """
    costs = routing.costs if costs is None else costs
    if costs is None:
        raise ValueError("resource_loss: give costs, or construct every Branch with a cost")
    weights = routing.weights
    if len(costs) != weights.shape[1]:
        raise ValueError(
            f"resource_loss: wanted one cost per branch, {weights.shape[1]}; got {len(costs)}"
        )
    cost = (weights @ weights.new_tensor(costs)).mean()
    return cost if budget is None else (cost - budget).clamp_min(0)
