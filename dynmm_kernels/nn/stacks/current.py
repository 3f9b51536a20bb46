"""One forward pass of a stack."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..decision import Decision
from ..routing import DepthRouting
from ..rules import TOP_ONE
from .stage import Cell


@dataclass
class Pass:
    """One forward pass: what goes in, and what it leaves."""

    inputs: tuple[Tensor, Tensor]
    cells: list[Cell]
    wanted: set[int]  # stages whose output is read
    reports: bool  # whether a Routing is wanted
    generator: torch.Generator | None
    outputs: dict[int, Tensor] = field(default_factory=dict)  # by stage, in sample order
    rows_run: list[int] = field(default_factory=list)
    decision: Decision = field(default_factory=lambda: Decision(TOP_ONE))
    blind: bool = False  # whether no way but masked does without the values of decisions
    keep: Tensor | None = None
    gate_cost: float = 0.0
    masked: bool = False  # by the choice of auto: what was not chosen is left out, not multiplied

    @property
    def num_rows(self) -> int:
        """N."""
        return self.inputs[0].shape[0]

    def routing(self) -> DepthRouting:
        """The decision and what it cost."""
        costs = None
        if all(cell.aux.cost is not None for cell in self.cells if cell.reads):
            costs = [sum(cell.main.cost or 0.0 for cell in self.cells)]
            for cell in self.cells:
                aux = (cell.aux.cost or 0.0) if cell.reads else 0.0
                costs.append(costs[-1] + aux + ((cell.fusion.cost or 0.0) if cell.fuses else 0.0))
        return DepthRouting(
            self.decision,
            num_rows=self.num_rows,
            rows_run=tuple(self.rows_run),
            costs=None if costs is None else tuple(costs),
            gate_cost=self.gate_cost,
            keep=self.keep,
        )
