"""Routing: what was decided for a batch, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional.plan import RoutingPlan
from .decision import Decision
from .rules import Rule


@dataclass(frozen=True, eq=False)
class Routing:
    """The decision behind one output of `RoutedFusion`.

    Attributes:
        choice: int64 [N], the branch of each sample (-1: none); with `select=k` int64 [N, k], with
            "multi_hot" bool [N, B]; None in dense execution.
        probs: [N, B], the gate's softmax ("multi_hot": sigmoid), with its graph; None where the
            choice was forced.
        plan: the `RoutingPlan`; None in dense execution.
        rows_run: rows each branch processed in the forward pass: all N in dense and masked
            execution; its own rows when routed, plus the complement that the exact
            straight-through gradient runs without a graph.
        costs: cost per sample of each branch, or None where a branch has none.
        gate_cost: cost per sample of the gate; 0 where unknown or not run.
        replays: calls of branches that were replayed and that were not; None without `capture`.
        selection: the rule that made `choice` out of logits.
    """

    decision: Decision
    num_rows: int
    rows_run: tuple[int, ...]
    costs: tuple[float, ...] | None
    gate_cost: float = 0.0
    replays: tuple[int, int] | None = None

    @property
    def choice(self) -> Tensor | None:
        return self.decision.choice

    @property
    def probs(self) -> Tensor | None:
        return self.decision.probs

    @property
    def plan(self) -> RoutingPlan | None:
        return self.decision.plan

    @property
    def selection(self) -> Rule:
        return self.decision.rule

    @property
    def weights(self) -> Tensor:
        """[N, B]: what multiplies the branches, with its gradient.

        `probs` in dense execution; else that of the chosen branches, carrying the
        straight-through gradient where there is a gate.
        """
        return self.decision.weights()

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples that chose each branch; in dense execution every sample takes every branch."""
        if self.plan is None:
            return (self.num_rows,) * len(self.rows_run)
        return self.plan.counts

    @property
    def device_counts(self) -> Tensor | None:
        """`counts` as int64 [B] on the device, without waiting for it; None in dense execution."""
        if self.plan is None:
            return None
        return self.plan.offsets.long().diff()

    @property
    def fractions(self) -> tuple[float, ...]:
        """`counts` as shares of the batch."""
        return tuple(count / max(1, self.num_rows) for count in self.counts)

    @property
    def expected_cost(self) -> Tensor | None:
        """Mean over samples of probs . costs plus the gate's cost: a differentiable scalar."""
        if self.costs is None or self.probs is None:
            return None
        return mean_cost(self.probs, self.costs) + self.gate_cost

    @property
    def executed_cost(self) -> float | None:
        """Cost per sample of what really ran in the forward pass, the gate included."""
        if self.costs is None:
            return None
        total = sum(rows * cost for rows, cost in zip(self.rows_run, self.costs, strict=True))
        return total / max(1, self.num_rows) + self.gate_cost


@dataclass(frozen=True, eq=False)
class DepthRouting(Routing):
    """The decision behind one output of a stack or of an `EarlyExit`: a depth in 0..L.

    As in `Routing`, with the depths for branches, and (of an `EarlyExit`, read its layers for the
    auxiliary stages and its heads for the fusions):

    Attributes:
        choice: int64 [N], the depth of each sample: the number of stages it was fused in (in a
            chain: the number of cells it came through, static ones too).
        plan: sorted by depth, the deepest first: branch i of the plan is depth L - i.
        rows_run: [1 + L]: rows of the main stream, then rows that each auxiliary stage processed;
            with the exact straight-through gradient also those it processed without a graph.
        costs: [1 + L], cost per sample of each depth: of all main stages, and of the auxiliary
            stages and fusions up to there. None unless every auxiliary stage is a `Branch` with a
            cost; main stages and fusions without one count as free.
        gate_cost: of a chain: of the gates that ran, on the rows they ran on.
        keep: float [N, L], only of a chain: the weight of each cell's fusion, with its gradient.
    """

    keep: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """[N, 1 + L]: how much each sample is of each depth, with its gradient."""
        if self.keep is None:
            return super().weights
        reached = torch.nn.functional.pad(self.keep, (1, 0), value=1.0)
        return reached - torch.nn.functional.pad(self.keep, (0, 1))

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each depth 0..L; in dense execution all go to the end."""
        if self.plan is None:
            return (*(0,) * (len(self.rows_run) - 1), self.num_rows)
        return self.plan.counts[::-1]

    @property
    def device_counts(self) -> Tensor | None:
        """`counts` as int64 [1 + L] on the device; None in dense execution."""
        counts = super().device_counts
        return None if counts is None else counts.flip(0)

    @property
    def expected_cost(self) -> Tensor | None:
        """Mean over samples of probs . costs plus the gate's cost: a differentiable scalar.

        In a chain the weights stand for the probabilities: a cell that a sample never came to
        has none.
        """
        if self.costs is None or self.keep is None:
            return super().expected_cost
        return mean_cost(self.weights, self.costs) + self.gate_cost

    @property
    def executed_cost(self) -> float | None:
        """Cost per sample of what really ran in the forward pass, the gates included."""
        if self.costs is None:
            return None
        total, before = 0.0, 0.0
        for rows, cost in zip(self.rows_run, self.costs, strict=True):
            total += rows * (cost - before)
            before = cost
        return total / max(1, self.num_rows) + self.gate_cost


def mean_cost(weights: Tensor, costs: Sequence[float]) -> Tensor:
    """Mean over samples of sum_b weights[:, b] * costs[b]: a scalar in fp32 or wider.

    Costs are large numbers that half precision cannot hold, and stay on the host, so that nothing
    waits for a copy to the device.
    """
    dtype = torch.promote_types(weights.dtype, torch.float32)
    totals = weights.sum(0, dtype=dtype) / max(1, weights.shape[0])
    return torch.stack([total * cost for total, cost in zip(totals, costs, strict=True)]).sum()
