"""A stack whose stages are all called in every call: in a traced graph, on ranks in step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import movement, sorting
from ...functional.filled import LEAST, FilledPlan
from ...functional.plan import RoutingPlan
from ..branch import forward_only
from .stage import Cell, Stage


class SteadyPrefix:
    """Both streams between two cells, N samples in slots, those that fuse first.

    Where fewer than `LEAST` samples fuse the next ones are fused, too, and nobody reads that; where
    the batch has fewer, all are.

    Attributes:
        main: [N, ...].
        aux: [size, ...], the samples that fuse, or `LEAST`.
        rest: [behind, ...], the samples that do not, or the last `LEAST`, without a graph; None
            where the gate does not ask what fusing them would have given.
        count: int32 [1], how many fuse; None: all.
        order: [N], the sample in each slot; None: as in the batch.
        unfused: [N, ...], what the last main stage returned.
    """

    def __init__(self, inputs: tuple[Tensor, Tensor]) -> None:
        self.main, self.aux = inputs
        self.rest: Tensor | None = None
        self.count: Tensor | None = None
        self.order: Tensor | None = None
        self.plan: RoutingPlan | None = None
        self.unfused = self.main
        self.size = self.behind = self.main.shape[0]
        self.traced = False
        self.rows_run = [self.size]
        self.hidden: list[Tensor] = []  # what the rest depends on, although it has no graph

    def sort_by_depth(
        self, plan: RoutingPlan, probs: Tensor | None, exact: bool
    ) -> tuple[Tensor | None, list[tuple[Tensor, Any, Any]]]:
        """Sorts the batch once for all cells; `probs` by slots, and what each cell narrows to."""
        main, aux = self.main, self.aux
        size, self.plan, self.traced, self.order = main.shape[0], plan, plan.traced, plan.order
        counts, sizes, rests = _read(plan)
        sources, starts, stops = [main, aux], [0, 0], [size, sizes[0]]
        if probs is not None:
            sources, starts, stops = [*sources, probs], [*starts, 0], [*stops, size]
        if exact:
            self.hidden.append(aux)
            sources = [*sources, aux.detach()]
            starts, stops = [*starts, size - rests[0]], [*stops, size]
        moved = movement.gather_slots(plan, sources, range(len(sources)), starts, stops)
        self.main, self.aux = moved[:2]
        self.rest = moved[-1] if exact else None
        self.size, self.behind = sizes[0], rests[0]
        cells = zip(counts.split(1), sizes, rests, strict=True)
        return (None if probs is None else moved[2]), [*cells]

    def narrow(self, count: Tensor, size: Any, behind: Any) -> None:
        """Only the first samples go on fusing; the others are of the rest, where there is one."""
        if self.rest is not None and self.count is not None:
            last, before = self.main.shape[0], self.behind
            parts = [last - behind, behind - before, self.size - last + before]
            self.hidden.append(self.aux)
            self.rest = torch.cat([self.aux.detach().split(parts)[1], self.rest])
        self.aux = self.aux.narrow(0, 0, size)
        self.count, self.size, self.behind = count, size, behind

    def sort(self, plan: RoutingPlan, keep: Tensor | None, exact: bool) -> Tensor | None:
        """Sorts by two levels, of slots: that fuse, all from among those that did, and that do not.

        `keep` by the new slots.
        """
        total, order = self.main.shape[0], plan.order
        (count,), (size,), (behind,) = _read(plan)
        self.traced, self.plan = plan.traced, None
        rows = self._rows().index_select(0, order)
        both = self.aux if self.rest is None else torch.cat([self.aux, self.rest])
        if exact:
            self.hidden.append(self.aux)
            self.rest = both.detach().index_select(0, rows.narrow(0, total - behind, behind))
        self.aux = both.index_select(0, rows.narrow(0, 0, size))
        self.order = order if self.order is None else self.order.index_select(0, order)
        sources = [self.main] if keep is None else [self.main, keep]
        starts, stops = [0] * len(sources), [total] * len(sources)
        self.main, *moved = movement.gather_slots(plan, sources, range(len(sources)), starts, stops)
        self.count, self.size, self.behind = count.view(1), size, behind
        return moved[0] if moved else None

    def spread(self, own: Tensor, rest: Tensor | None) -> Tensor:
        """[N, ...]: what was made of `aux` and of `rest`, by slots; zero where there is neither."""
        both = own if rest is None else torch.cat([own, rest])
        spread = both.index_select(0, self._rows())
        if rest is not None or self.count is None:
            return spread
        return torch.where(self.fuses().view(-1, *[1] * (spread.ndim - 1)), spread, 0)

    def head(self, rows: Tensor) -> Tensor:
        """Those of `aux`, out of all."""
        return rows.narrow(0, 0, self.size)

    def tail(self, rows: Tensor) -> Tensor:
        """Those of `rest`, out of all; without a graph."""
        return rows.detach().split([rows.shape[0] - self.behind, self.behind])[1]

    def fuses(self) -> Tensor:
        """bool [N], by slots."""
        slot = self._slots()
        return slot >= 0 if self.count is None else slot < self.count

    def _slots(self) -> Tensor:
        return torch.arange(self.main.shape[0], dtype=torch.int32, device=self.main.device)

    def _rows(self) -> Tensor:
        """int32 [N]: where the sample of each slot is in `aux` and `rest`; 0 where it is not."""
        slot = self._slots()
        other: Tensor | int = 0
        if self.rest is not None:
            other = slot + (self.size + self.behind - self.main.shape[0])
        return torch.where(self.fuses(), slot, other)

    def step(self, cell: Cell, weights: Tensor | None) -> None:
        """Runs one cell; `weights`: [N, 2], of skipping and fusing, where they learn."""
        size = self.main.shape[0]
        self.main = self.unfused = main = _run(cell.main, self.main)
        if not cell.reads:
            self.rows_run.append(0)
            return
        others = self._follow(cell, main)
        self.aux = _run(cell.aux, self.aux)
        self.rows_run.append(self.size + (0 if self.rest is None else self.behind))
        if not cell.fuses:
            return
        fused = cell.fuse(self.head(main), self.aux)
        slot, fuses = self._slots(), self.fuses()
        taken = torch.where(fuses, slot, slot + size)
        order = torch.cat([torch.where(fuses, slot, -1), torch.where(fuses, -1, slot)])
        parts = order, taken.unsqueeze(1), order
        plan = FilledPlan(*parts, host_header=[0, size, 2 * size, 0, -1], traced=self.traced)
        rows, starts = [fused, main], [0, size]
        if weights is None:
            self.main = movement.combine_rows(plan, rows, starts)
            return
        unfused, other = torch.where(fuses, -1, taken), torch.where(fuses, slot, -1)
        hidden = None
        if others:
            tensors = [*self.hidden]
            hidden = lambda: tensors  # noqa: E731
            starts = [*starts, 3 * size - self.behind]
            unfused, other = slot + size, torch.where(fuses, slot, slot + 2 * size)
        index = torch.stack([unfused, other], 1)
        rows = [*rows, *others]
        self.main = movement.combine_selected(plan, rows, starts, 2, weights, index, hidden)

    def _follow(self, cell: Cell, main: Tensor) -> list[Tensor]:
        """What the cell would make of the rest."""
        if self.rest is None:
            return []
        with forward_only([cell.aux, cell.fusion]):
            self.rest = _run(cell.aux, self.rest)
            self.hidden += [main, *cell.aux.parameters()]
            if not cell.fuses:
                return []
            self.hidden += [*cell.fusion.parameters()]
            return [cell.fuse(self.tail(main), self.rest)]

    def read(self) -> Tensor:
        """The main stream in sample order."""
        return self.main.clone() if self.order is None else self.restore(self.main)

    def restore(self, slots: Tensor) -> Tensor:
        """A tensor by slots [N, ...] in sample order."""
        if self.order is None:
            return slots
        if self.plan is None:
            order, size = self.order, slots.shape[0]
            inverse = torch.empty_like(order).scatter_(0, order.long(), self._slots())
            parts = order, inverse.unsqueeze(1), order
            self.plan = FilledPlan(*parts, host_header=[0, size, 0, -1], traced=self.traced)
        return movement.combine_rows(self.plan, [slots], [0])


def _run(stage: Stage, rows: Tensor) -> Tensor:
    return stage.run(rows.clone() if stage.in_place else rows, read=())


def _read(plan: RoutingPlan) -> tuple[Tensor, Sequence[Any], Sequence[Any]]:
    """Of all levels but the lowest: how many samples have them (int32, on the device).

    And on the host how many fuse there, and how many do not, both `LEAST` at least.
    """
    size, depth, counts = plan.num_rows, plan.num_branches - 1, plan.offsets[1:-1].flip(0)
    if not plan.traced:
        least = min(LEAST, size)
        numbers = [sorting.at_least(plan, k) for k in range(1, depth + 1)]
        rests = [max(size - number, least) for number in numbers]
        return counts, [max(number, least) for number in numbers], rests
    missing = size - plan.offsets[-1:] + plan.header[-2:-1]
    lists = [counts.clamp_min(LEAST), (size - counts).clamp_min(LEAST), missing]
    *read, faults = torch.cat(lists).cpu().tolist()
    torch._check(faults == 0)
    sizes, rests = read[:depth], read[depth:]
    for k in range(depth):
        torch._check(sizes[k] >= LEAST)
        torch._check(rests[k] >= LEAST)
        torch._check(sizes[k] <= (sizes[k - 1] if k else size))
        torch._check(rests[k] <= size)
        torch._check(size - rests[k] <= sizes[k])
        if k:
            torch._check(rests[k] >= rests[k - 1])
            torch._check(size - rests[k - 1] <= sizes[k - 1])
    return counts, sizes, rests
