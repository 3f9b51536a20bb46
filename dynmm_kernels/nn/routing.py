"""Routing: what was decided for a batch, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import RoutingPlan
from .gates import one_hot, straight_through


@dataclass(frozen=True, eq=False)
class Routing:
    """The decision behind one output of `RoutedFusion`.

    Attributes:
        choice: int64 [N], the branch of each sample (-1: none); None in dense execution.
        probs: [N, B], the gate's softmax, with its graph; None where the choice was forced.
        plan: the `RoutingPlan`; None in dense execution.
        rows_run: rows each branch processed in the forward pass: all N in dense and masked
            execution; its own rows when routed, plus the complement that the exact
            straight-through gradient runs without a graph.
        costs: cost per sample of each branch, or None where a branch has none.
        gate_cost: cost per sample of the gate; 0 where unknown or not run.
    """

    choice: Tensor | None
    probs: Tensor | None
    plan: RoutingPlan | None
    num_rows: int
    rows_run: tuple[int, ...]
    costs: tuple[float, ...] | None
    gate_cost: float = 0.0

    @property
    def weights(self) -> Tensor:
        """[N, B]: what multiplies the branches, with its gradient.

        The softmax in dense execution; else the one-hot choice, carrying the straight-through
        gradient where there is a gate.
        """
        if self.choice is None:
            assert self.probs is not None  # dense always has probabilities
            return self.probs
        if self.probs is None:
            return one_hot(self.choice, len(self.rows_run), torch.float32)
        return straight_through(self.choice, self.probs)

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples that chose each branch; in dense execution every sample takes every branch."""
        if self.plan is None:
            return (self.num_rows,) * len(self.rows_run)
        return self.plan.counts

    @property
    def fractions(self) -> tuple[float, ...]:
        """`counts` as shares of the batch."""
        return tuple(count / max(1, self.num_rows) for count in self.counts)

    @property
    def expected_cost(self) -> Tensor | None:
        """Mean over samples of probs . costs plus the gate's cost: a differentiable scalar."""
        if self.costs is None or self.probs is None:
            return None
        costs = self.probs.new_tensor(self.costs)
        return (self.probs @ costs).mean() + self.gate_cost

    @property
    def executed_cost(self) -> float | None:
        """Cost per sample of what really ran in the forward pass, the gate included."""
        if self.costs is None:
            return None
        total = sum(rows * cost for rows, cost in zip(self.rows_run, self.costs, strict=True))
        return total / max(1, self.num_rows) + self.gate_cost
