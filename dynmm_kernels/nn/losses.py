"""Losses for gates: what their choices cost, and that no branch be forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .routing import DepthRouting, Routing, mean_cost

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
    routings = _several("resource_loss", routing)
    if isinstance(routing, Routing):
        tables = [costs]
    else:
        tables = [None] * len(routings) if costs is None else [*costs]
    if len(tables) != len(routings):
        raise ValueError(
            f"resource_loss: wanted one list of costs per routing; got {len(tables)} for "
            f"{len(routings)} routings"
        )
    each = [
        _cost(one, table, reduction)  # type: ignore[arg-type]
        for one, table in zip(routings, tables, strict=True)
    ]
    total = torch.stack(each).sum()
    return total if budget is None else (total - budget).clamp_min(0)


def balance_loss(routing: Routing | Sequence[Routing]) -> Tensor:
    """How unevenly the branches are used: 1 when all are used alike, up to B when one is.

    B * sum_b f_b * p_b, the load balancing loss of the Switch Transformer (Fedus et al. 2021,
    eq. 4-6); of several fusions, the sum over them. f_b is the share of all choices that fell on
    b, a constant; p_b the mean probability of b, through which the gradient reaches the gate.
    With `select=k` a sample makes k choices. With "multi_hot" a sample's probabilities are divided
    by their sum, as DeepSeek-V3 does with its sigmoids, so that a gate cannot evade by making all
    of them small. The branches of a `NestedFusion` are its depths.

    In dense execution f_b is the value of p_b. Where a choice was forced p_b is f_b, and there is
    no gradient. 0 for an empty batch.

    Args:
        routing: from `fusion(..., return_routing=True)`; or several, of fusions in one model.

    Returns:
        A scalar in fp32, or wider as the probabilities are. 0.01 is a usual strength.

    Raises:
        TypeError, ValueError: not a routing, an empty list, or the routing of a `ChainedFusion`.
    """
    total: list[Tensor] = []
    for one in _with_probabilities("balance_loss", routing):
        probable, counts = _mean(_shares(one)), one.device_counts
        taken = probable.detach() if counts is None else counts.to(probable.dtype)
        taken = taken / taken.sum().clamp_min(1)
        total.append(len(probable) * (taken * probable).sum())
    return torch.stack(total).sum()


def entropy_loss(routing: Routing | Sequence[Routing], local: float = 0.0) -> Tensor:
    """Minus the entropy of the mean decision: least, -log B, when all branches are used alike.

    With p_n the probabilities of sample n, H the entropy in nats:

        -H(mean_n p_n) + local * mean_n H(p_n)

    of several fusions, the sum over them. These are the global and the local loss of LIMoE
    (Mustafa et al. 2022), a mixture of experts over modalities: the first keeps every branch in
    use, the second makes each sample sure of its own. With local=1 the sum is minus the mutual
    information of sample and branch. "multi_hot", depths and dense execution are as in
    `balance_loss`; a forced choice counts as a sure one, and has no gradient. 0 for an empty batch.

    Args:
        routing: from `fusion(..., return_routing=True)`; or several, of fusions in one model.
        local: weight of the second term, not negative.

    Returns:
        A scalar in fp32, or wider as the probabilities are.

    Raises:
        TypeError, ValueError: as `balance_loss`; a `local` that is not a number >= 0.
    """
    if not isinstance(local, (int, float)) or not local >= 0:
        raise ValueError(f"entropy_loss: local must be a number >= 0; got {local!r}")
    total: list[Tensor] = []
    for one in _with_probabilities("entropy_loss", routing):
        shares = _shares(one)
        total.append(-_entropy(_mean(shares)))
        if local:
            total.append(local * _entropy(shares).sum() / max(1, len(shares)))
    return torch.stack(total).sum()


def _several(name: str, routing: Routing | Sequence[Routing]) -> list[Routing]:
    routings = [*routing] if isinstance(routing, (list, tuple)) else [routing]
    for one in routings:
        if not isinstance(one, Routing):
            raise TypeError(
                f"{name}: wanted a Routing, from fusion(..., return_routing=True), or a list of "
                f"them; got {type(one).__name__}"
            )
    if not routings:
        raise ValueError(f"{name}: wanted at least one routing; got an empty list")
    return routings  # type: ignore[return-value]


def _with_probabilities(name: str, routing: Routing | Sequence[Routing]) -> list[Routing]:
    routings = _several(name, routing)
    for one in routings:
        if isinstance(one, DepthRouting) and one.keep is not None:
            raise ValueError(
                f"{name}: a ChainedFusion decides cell by cell and has no probabilities of its "
                "depths; use the mean of routing.keep, [N, L], such as "
                "(routing.keep.mean(0) - 0.5).square().sum()"
            )
    return routings


def _shares(routing: Routing) -> Tensor:
    """[N, B]: the probabilities of each sample, summing to 1; zeros where it takes nothing."""
    probs = routing.weights if routing.probs is None else routing.probs
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    total = probs.sum(1, keepdim=True)
    return probs / total.masked_fill(total <= 0, 1)


def _mean(shares: Tensor) -> Tensor:
    """[B]: over the samples that take anything."""
    return shares.sum(0) / shares.detach().sum().clamp_min(1)


def _entropy(shares: Tensor) -> Tensor:
    """Over the last dimension; its gradient at 0 is large, but finite."""
    return -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum(-1)


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
