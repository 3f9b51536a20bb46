"""A stack in a traced graph: sorted by depth, every stage called, on two samples at least."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...functional import movement
from ...functional.filled import LEAST, FilledPlan
from ...functional.plan import RoutingPlan
from ..branch import forward_only
from .stage import Cell, Stage


class SteadyPrefix:
    """Both streams between two cells, N samples in slots, the deepest first.

    Where fewer than `LEAST` samples fuse the next ones are fused, too, and nobody reads that.

    Attributes:
        main: [N, ...].
        aux: the samples that fuse, or `LEAST`.
        rest: the samples that do not, or the last `LEAST`, without a graph; None where the gate
            does not ask what fusing them would have given.
        counts: int32 [L], how many fuse in each cell.
        sizes, rests: of `aux` and `rest` in each cell, on the host.
    """

    def __init__(
        self, inputs: tuple[Tensor, Tensor], plan: RoutingPlan, probs: Tensor | None, exact: bool
    ) -> None:
        main, aux = inputs
        size, self.plan = main.shape[0], plan
        self.counts = plan.offsets[1:-1].flip(0)
        self.sizes, self.rests = _read(plan, self.counts)
        sources, starts, stops = [main, aux], [0, 0], [size, self.sizes[0]]
        if probs is not None:
            sources, starts, stops = [*sources, probs], [*starts, 0], [*stops, size]
        if exact:
            rest = size - self.rests[0], size
            sources = [*sources, aux.detach()]
            starts, stops = [*starts, rest[0]], [*stops, rest[1]]
        moved = movement.gather_slots(plan, sources, range(len(sources)), starts, stops)
        self.main, self.aux = moved[:2]
        self.probs = None if probs is None else moved[2]
        self.rest = moved[-1] if exact else None
        self.rows_run = [size]

    def step(self, k: int, cell: Cell, weights: Tensor | None) -> None:
        """Cell k, counting from 0; `weights`: [N, 2], of skipping and fusing, where they learn."""
        size, count = self.main.shape[0], self.sizes[k]
        main = _run(cell.main, self.main)
        others: list[Tensor] = []
        if self.rest is not None:
            others = [self._follow(k, cell, main)]
        self.aux = _run(cell.aux, self.aux.narrow(0, 0, count))
        fused = cell.fuse(main.narrow(0, 0, count), self.aux)
        self.rows_run.append(count + (self.rests[k] if others else 0))
        slot = torch.arange(size, dtype=torch.int32, device=main.device)
        fuses = slot < self.counts[k]
        taken = torch.where(fuses, slot, slot + size)
        order = torch.cat([torch.where(fuses, slot, -1), torch.where(fuses, -1, slot)])
        parts = order, taken.unsqueeze(1), order
        plan = FilledPlan(*parts, host_header=[0, size, 2 * size, 0, -1], traced=True)
        rows, starts = [fused, main], [0, size]
        if weights is None:
            self.main = movement.combine_rows(plan, rows, starts)
            return
        unfused, other = torch.where(fuses, -1, taken), torch.where(fuses, slot, -1)
        if others:
            starts = [*starts, 3 * size - self.rests[k]]
            unfused, other = slot + size, torch.where(fuses, slot, slot + 2 * size)
        index = torch.stack([unfused, other], 1)
        rows = [*rows, *others]
        self.main = movement.combine_selected(plan, rows, starts, 2, weights, index, None)

    def _follow(self, k: int, cell: Cell, main: Tensor) -> Tensor:
        """What the cell would make of the rest."""
        assert self.rest is not None
        size, rest = main.shape[0], self.rests[k]
        if k:
            before = self.rests[k - 1]
            parts = [size - rest, rest - before, self.sizes[k - 1] - size + before]
            self.rest = torch.cat([self.aux.detach().split(parts)[1], self.rest])
        with forward_only([cell.aux, cell.fusion]):
            self.rest = _run(cell.aux, self.rest)
            return cell.fuse(main.detach().split([size - rest, rest])[1], self.rest)

    def read(self) -> Tensor:
        """The main stream in sample order."""
        return movement.combine_rows(self.plan, [self.main], [0])


def _run(stage: Stage, rows: Tensor) -> Tensor:
    return stage.run(rows.clone() if stage.in_place else rows, read=())


def _read(plan: RoutingPlan, counts: Tensor) -> tuple[list[Any], list[Any]]:
    """How many samples the cells fuse, and how many they do not, both `LEAST` at least."""
    size, depth = plan.num_rows, counts.shape[0]
    missing = size - plan.offsets[-1:] + plan.header[-2:-1]
    lists = [counts.clamp_min(LEAST), (size - counts).clamp_min(LEAST), missing]
    *numbers, faults = torch.cat(lists).cpu().tolist()
    torch._check(faults == 0)
    sizes, rests = numbers[:depth], numbers[depth:]
    for k in range(depth):
        torch._check(sizes[k] >= LEAST)
        torch._check(rests[k] >= LEAST)
        torch._check(sizes[k] <= (sizes[k - 1] if k else size))
        torch._check(rests[k] <= size)
        torch._check(size - rests[k] <= sizes[k])
        if k:
            torch._check(rests[k] >= rests[k - 1])
            torch._check(size - rests[k - 1] <= sizes[k - 1])
    return sizes, rests
