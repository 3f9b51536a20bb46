"""What routing could win at most: multiply-accumulates of the same model, counted.

A forward counts once and a backward twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.nyud import SegmentationNet


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


@dataclass(frozen=True)
class StackCosts:
    """Multiply-accumulates per sample of all that every sample needs, and of each depth stage."""

    always: float
    gate: float
    stages: tuple[float, ...]

    def ceiling(self, depths: Tensor, training: bool) -> float:
        """Masked over routed if time went by multiply-accumulates; Stage I asks no gate."""
        always = self.always + (0 if training else self.gate)
        masked = len(depths) * (always + sum(self.stages))
        active = [int((depths > k).sum()) for k in range(len(self.stages))]
        rows = zip(active, self.stages, strict=True)
        return masked / (len(depths) * always + sum(count * cost for count, cost in rows))


@cache
def stack_costs(kind: str, height: int) -> StackCosts:
    """Counted on the meta device, for one sample."""

    def macs(call: Callable[[], Any]) -> tuple[float, Any]:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            result = call()
        return counter.get_total_flops() / 2, result

    net = SegmentationNet(kind).eval().to("meta")
    rgb, depth = (torch.empty(1, c, height, height * 4 // 3, device="meta") for c in (3, 1))
    always, (main, aux) = macs(lambda: net.stems(rgb, depth))
    gate, _ = macs(lambda: net.gate(main, aux))
    stages, outputs = [], []
    for k in range(4):
        cost, main = macs(lambda k=k, x=main: net.rgb.stages[k](x))
        always += cost
        cost, aux = macs(lambda k=k, x=aux: net.depth.stages[k](x))
        added, main = macs(lambda k=k, r=main, a=aux: net.fusions[k + 1](r, a))
        stages.append(cost + added)
        outputs.append(main)
    decoder, _ = macs(lambda: net.decode(outputs))
    return StackCosts(always + decoder, gate, tuple(stages))
