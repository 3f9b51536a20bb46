"""What routing could win at most: multiply-accumulates of the same model, counted.

A forward counts once and a backward twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates per sample."""

    gate: float
    branches: tuple[float, ...]


def routed_macs(costs: Costs, counts: Sequence[int], gate_grad: str | None = None) -> float:
    """One routed forward, or one training step; ``counts`` holds the samples of each branch.

    ``gate_grad`` is None for inference. With "straight_through" every branch goes forward on every
    row and backward on its own rows; with "selected" it sees its own rows only.
    """
    gate = sum(counts) * costs.gate
    chosen = sum(cost * count for cost, count in zip(costs.branches, counts, strict=True))
    if gate_grad is None:
        return gate + chosen
    forward = chosen if gate_grad == "selected" else sum(counts) * sum(costs.branches)
    return 3 * gate + forward + 2 * chosen


def masked_macs(costs: Costs, n: int, training: bool = False) -> float:
    """The same with every branch on every row."""
    return (3 if training else 1) * n * (costs.gate + sum(costs.branches))


def ceiling(costs: Costs, counts: Sequence[int], gate_grad: str | None = None) -> float:
    """The speed-up over masked if time were proportional to multiply-accumulates."""
    training = gate_grad is not None
    return masked_macs(costs, sum(counts), training) / routed_macs(costs, counts, gate_grad)
