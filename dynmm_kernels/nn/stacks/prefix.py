"""Two streams whose samples are sorted so that those that still fuse always come first.

A stage then works on prefixes: nothing is gathered between stages, and nothing is put back before
somebody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...functional import movement, sorting
from ...functional.plan import RoutingPlan
from ..branch import forward_only
from ..memory import apart, depends_on, sharing
from .stage import Cell, Stage

# What becomes of a sample in the rest of a chain: nothing; it follows without a graph, because the
# exact gradient of a gate asks for it; it goes on.
THROUGH, FOLLOWS, FUSES = range(3)


class Prefix:
    """Both streams between two cells, N samples in slots.

    Attributes:
        reads_aux: whether any cell does.
        main: [N, ...].
        lent: outputs of stages that the caller reads, as long as a stream shares their memory.
        seen: what a gate or a fusion has read and may keep for its backward pass.
        aux: [n, ...], the samples that still fuse; None where n is 0.
        rest: [r, ...], samples n..n+r: the exact gradient of the gate asks what fusing them would
            have given. Without a graph. None where r is 0.
        order: int32 [N], the sample in each slot; None: as in the batch.
        plan: of that order, once somebody needed it.
        unfused: [N, ...], what the last main stage returned, where a gate is to read it.
    """

    def __init__(self, inputs: tuple[Tensor, Tensor], reads_aux: bool) -> None:
        self.inputs = inputs
        self.reads_aux = reads_aux
        self.lent: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.main = inputs[0]
        self.aux: Tensor | None = inputs[1]
        self.rest: Tensor | None = None
        self.order: Tensor | None = None
        self.plan: RoutingPlan | None = None
        self.unfused: Tensor | None = None
        self.keeps_unfused = False
        self.starved: list[Tensor] = []
        self.left: list[Tensor] = []  # aux, where it went on without a graph
        self.followers: list[Stage] = []  # what has run on it since
        self.weights: list[Tensor] = []  # from which the gate learns exactly
        self.rows_run: list[int] = [self.main.shape[0]]

    @property
    def active(self) -> int:
        """n."""
        return 0 if self.aux is None else self.aux.shape[0]

    @property
    def following(self) -> int:
        """r."""
        return 0 if self.rest is None else self.rest.shape[0]

    def sort_by_depth(
        self, plan: RoutingPlan, first: int, follow: bool, probs: Tensor | None
    ) -> Tensor | None:
        """Sorts the batch once for all cells from the `first` on; `probs` by slots.

        Everything moves in one call; nothing does where all samples have one depth.
        """
        main, aux = self.main, self.aux
        assert aux is not None
        size, count = main.shape[0], sorting.at_least(plan, first)
        if max(plan.counts) == size:
            self.narrow(count, follow)
            return probs
        self.plan, self.order = plan, plan.order
        sources, starts, stops = [main, aux], [0, 0], [size, count]
        if follow and count < size:
            sources, starts, stops = [*sources, aux.detach()], [*starts, count], [*stops, size]
        if probs is not None:
            sources, starts, stops = [*sources, probs], [*starts, 0], [*stops, size]
        moved = movement.gather_slots(plan, sources, range(len(sources)), starts, stops)
        self.main, self.aux = moved[:2]
        if follow and count < size:
            self.rest = moved[2]
            self.left.append(aux)
        return None if probs is None else moved[-1]

    def narrow(self, count: int, follow: bool) -> None:
        """Only the first `count` samples go on; the others follow without a graph if they must."""
        aux = self.aux
        if aux is None or count == aux.shape[0]:
            return
        if follow:
            self.left.append(aux)
            stopped = aux.detach()[count:]
            self.rest = stopped if self.rest is None else torch.cat([stopped, self.rest])
        self._go_on(aux, count)

    def sort(self, plan: RoutingPlan, keep: Tensor | None) -> Tensor | None:
        """Sorts the first n + r samples by the levels FUSES (all from among the first n), FOLLOWS
        and THROUGH; `keep` by the new slots.
        """
        seen = plan.num_rows
        count, stop = sorting.at_least(plan, FUSES), sorting.at_least(plan, FOLLOWS)
        if (count, stop) == (self.active, seen):
            return keep
        both = [part for part in (self.aux, self.rest) if part is not None]
        aux = both[0] if len(both) == 1 else torch.cat(both)
        self.left.append(aux)
        if max(plan.counts) < seen:
            sources = [self.main[:seen], aux, aux.detach()]
            starts, stops = [0, 0, count], [seen, count, stop]
            if keep is not None:
                sources, starts, stops = [*sources, keep[:seen]], [*starts, 0], [*stops, seen]
            used = [i for i in range(len(sources)) if starts[i] < stops[i]]
            moved = movement.gather_slots(
                plan, sources, used, [starts[i] for i in used], [stops[i] for i in used]
            )
            by_source = dict(zip(used, moved, strict=True))
            self._order(plan)
            self.main = _replace(self.main, by_source[0])
            keep = None if keep is None else _replace(keep, by_source[3])
            if count == 0:
                self._go_on(aux, 0)
            self.aux, self.rest = by_source.get(1), by_source.get(2)
            return keep
        self.rest = aux.detach()[count:stop] if count < stop else None
        self._go_on(aux, count)
        return keep

    def _order(self, plan: RoutingPlan) -> None:
        order, before = plan.order, self.order
        if before is not None:
            order = _replace(before, before.index_select(0, order))
        self.plan, self.order = None, order

    def _go_on(self, aux: Tensor, count: int) -> None:
        if count == 0 and self.reads_aux and aux.requires_grad and torch.is_grad_enabled():
            self.starved.append(aux)
        self.aux = aux[:count] if count else None

    def step(self, cell: Cell, weights: Tensor | None = None, exact: bool = False) -> None:
        """Runs one cell: the main stage on all samples, the others on those that fuse.

        Args:
            weights: [N, 2], of skipping and of fusing, where the gate learns from this cell.
            exact: whether weights that are 0 learn, too.
        """
        others = self._auxiliary()
        read, held = [*self.inputs, *self.lent], [*self.lent, *self.seen]
        main = cell.main.run(cell.main.spare(self.main, [*self.inputs, *held, *others]), read=read)
        self.lent = sharing(self.lent, [main, *others])
        self.main, self.unfused = main, main if self.keeps_unfused else None
        del read  # frees what the stage read
        self.rows_run.append(self.active + self.following if cell.reads else 0)
        held = [*self.inputs, *held, main]
        rest = self._follow(cell, main, [*held, *others])
        if self.aux is None:
            self.starved += cell.starved()
        elif cell.reads:
            self.aux = cell.aux.run(cell.aux.spare(self.aux, held), read=[*self.inputs, *self.lent])
        streams = [main, *self._auxiliary()]
        self.seen = sharing(self.seen, streams)
        if not cell.fuses:
            return
        self.see(*streams)
        if weights is None:
            if self.aux is not None:
                self.main = self._fuse(cell, main, self.aux)
            return
        head, tail = split_rows(main, self.active)
        fused = None
        if self.aux is not None and head is not None:
            fused = self._fuse_head(cell, head, tail, self.aux)
        hidden = None
        if exact:
            self.weights.append(weights)
            hidden = self._hidden(main)
        self.main = movement.fuse_prefix(head, tail, fused, rest, weights, exact, hidden)

    def _auxiliary(self) -> list[Tensor]:
        return [part for part in (self.aux, self.rest) if part is not None]

    def see(self, *tensors: Tensor) -> None:
        """Notes what was read while a graph was recorded: in-place stages leave it alone."""
        if torch.is_grad_enabled():
            self.seen += tensors

    def _hidden(self, main: Tensor) -> Callable[[], list[Tensor]]:
        """What the rest depends on, although it has no graph."""
        tensors, stages = [*self.left, main], [*self.followers]
        return lambda: [*tensors, *(p for stage in stages for p in stage.parameters())]

    def _fuse(self, cell: Cell, main: Tensor, aux: Tensor) -> Tensor:
        """All rows of `main`, those that `aux` has fused with it."""
        if cell.fusion.fuses_prefix:
            return cell.fuse(main, aux)
        head, tail = split_rows(main, self.active)
        fused = self._fuse_head(cell, main if head is None else head, tail, aux)
        return fused if tail is None or head is None else torch.cat([fused, tail])

    def _fuse_head(self, cell: Cell, head: Tensor, tail: Tensor | None, aux: Tensor) -> Tensor:
        """Where all samples fuse, a fusion may leave the main stream without a gradient."""
        fused = cell.fuse(head, aux)
        learns = head.requires_grad and torch.is_grad_enabled()
        if tail is None and learns and not depends_on(fused, head):
            self.starved.append(head)
        return fused

    def _follow(self, cell: Cell, main: Tensor, held: Sequence[Tensor]) -> Tensor | None:
        """What the cell would make of the rest: forward only, for its gradient is zero."""
        if self.rest is None or not cell.reads:
            return None
        with forward_only([cell.aux, cell.fusion]):
            self.rest = cell.aux.run(
                cell.aux.spare(self.rest, held), read=[*self.inputs, *self.lent]
            )
            self.followers.append(cell.aux)
            if not cell.fuses:
                return None
            self.followers.append(cell.fusion)
            return cell.fuse(main.detach()[self.active : self.active + self.following], self.rest)

    def read(self) -> Tensor:
        """The main stream in sample order, in memory of its own."""
        output = self.main
        held = [*self.inputs, *self.seen]
        output = apart(output, held) if self.order is None else self.restore(output)
        self.lent.append(self.main)  # also where it was copied: who writes there always fails
        if not self.starved:
            return output
        hidden = (lambda: self.weights) if self.weights else None
        return movement.touch([output], self.starved, hidden)[0]

    def restore(self, slots: Tensor) -> Tensor:
        """A tensor by slots [N, ...] in sample order."""
        if self.order is None:
            return slots
        if self.plan is None:
            self.plan = sorting.permutation(self.order)
        return movement.combine_rows(self.plan, [slots], [0])


def split_rows(rows: Tensor, count: int) -> tuple[Tensor | None, Tensor | None]:
    """The first `count` rows and the others; in the graph one node with one gradient."""
    if count == rows.shape[0]:
        return rows, None
    if count == 0:
        return None, rows
    head, tail = rows.split([count, rows.shape[0] - count])
    return head, tail


def _replace(rows: Tensor, first: Tensor) -> Tensor:
    """`rows` with `first` for its first rows."""
    return first if len(first) == len(rows) else torch.cat([first, rows[len(first) :]])
