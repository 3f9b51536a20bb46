"""One stream of layers that samples leave: sorted once, so that those that go on come first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional import checks, movement, sorting, tree
from ...functional.plan import RoutingPlan
from ..arguments import Arguments
from ..branch import Branch, forward_only
from ..decision import Decision
from ..memory import apart
from ..routed.execution import Result, blend_outputs, touch_starved
from ..routed.selecting import select_outputs
from ..stacks.prefix import split_rows
from ..stacks.stage import Stage


class Block(NamedTuple):
    """What was made of samples that leave at a depth, or would have: some rows, and their slots."""

    depth: int
    output: Any
    start: int
    rows: int


class Exits:
    """Layers in a row, and what is made of a sample that leaves.

    Attributes:
        heads: one for each depth, how many layers a sample came through; None: its rows as they
            are.
        batch: the stream, and what all layers read beside.
    """

    def __init__(
        self, layers: Sequence[Stage], heads: Sequence[Branch] | None, batch: Arguments
    ) -> None:
        self.layers = layers
        self.heads = heads
        self.batch = batch
        self.depths = range(1 + len(layers))

    @property
    def parts(self) -> list[Branch]:
        return [*self.layers, *(self.heads or ())]

    def labels(self) -> list[str]:
        """What messages call the outputs, by depth."""
        if self.heads is not None:
            return [head.label for head in self.heads]
        return ["the input", *(layer.label for layer in self.layers)]

    def leave(self, depth: int, rows: Tensor) -> Any:
        """What is made of samples that leave."""
        if self.heads is None:  # as wide as x, whoever leaves where: autocast may narrow it
            return rows.to(torch.promote_types(rows.dtype, self.batch.selected[0].dtype))
        head = self.heads[depth]
        return head.call_reading([rows], [rows.clone() if head.in_place else rows])

    def step(self, depth: int, rows: Tensor, others: Sequence[Any]) -> Tensor:
        """The layer that leads to a depth; it may write into no rows but copies."""
        layer = self.layers[depth - 1]
        given = rows.clone() if layer.in_place else rows
        return layer.run(given, *others, read=[rows, *self.batch.held()])

    def run_everywhere(self, decision: Decision, selects: bool = False) -> Result:
        """Every layer and head on every sample, then the weighted sum.

        `selects`: what was not chosen is left out, not multiplied by zero.
        """
        size = decision.num_rows
        rows, *others = self.batch.whole(size)
        outputs = [self.leave(0, rows)]
        for depth in self.depths[1:]:
            rows = self.step(depth, rows, others)
            outputs.append(self.leave(depth, rows))
        rows_run = (size,) * len(outputs)
        if selects:
            return select_outputs(outputs, self.labels(), decision, by_branch=False), rows_run
        return blend_outputs(outputs, self.labels(), decision), rows_run

    def run_routed(self, decision: Decision) -> Result:
        """Every layer on the samples that reach it; they come first, the deepest foremost."""
        plan, exact = decision.plan, decision.exact
        assert plan is not None
        size = plan.num_rows
        alive = [*(sorting.at_least(plan, depth) for depth in self.depths), 0]
        sources = self._sort(plan)
        rows = sources[0]
        rest: Tensor | None = None  # who left, without a graph
        leaving: list[Block] = []
        others: list[Block] = []  # what the gate's exact gradient asks for beside; without a graph
        for depth in self.depths:
            count, deeper = alive[depth : depth + 2]
            if rest is not None:
                with forward_only(self.parts):
                    rest = self.step(depth, rest, self._beside(sources, count, size))
                    beside = self.leave(depth, rest)
                others.append(Block(depth, beside, size * (1 + depth) + count, size - count))
            if not count:
                continue
            if depth:
                rows = self.step(depth, rows, self._beside(sources, 0, count))
            if exact and deeper:
                with forward_only(self.parts):
                    beside = self.leave(depth, rows.detach()[:deeper])
                others.append(Block(depth, beside, size * (1 + depth), deeper))
            deep, own = split_rows(rows, deeper)
            if own is None:
                continue
            if deep is not None:
                rows = deep
                if self.heads is None and not torch.is_grad_enabled():
                    own = own.clone()  # so that the rows of the others are freed
            leaving.append(Block(depth, self.leave(depth, own), deeper, count - deeper))
            if exact:
                behind = [own.detach()] if rest is None else [own.detach(), rest]
                rest = torch.cat(behind)
        combined, spec = self._put(decision, leaving, others)
        if torch.is_grad_enabled():
            combined = self._touch_starved(decision, combined, {block.depth for block in leaving})
        rows_run = (size, *(size if exact else count for count in alive[1:-1]))
        return tree.unflatten(combined, spec), rows_run

    def _sort(self, plan: RoutingPlan) -> list[Tensor]:
        """The per-sample tensors by slots; the caller's own where all samples have one depth."""
        batch, size, order = self.batch, plan.num_rows, None
        moved = tensors = batch.tensors()
        if size not in plan.counts:
            order, count = plan.order, len(tensors)
            moved = movement.gather_slots(plan, tensors, range(count), [0] * count, [size] * count)
        here = iter(moved)
        sources = []
        for i in batch.rows:
            leaf = batch.leaves[i]
            if isinstance(leaf, tree.Lazy):
                wanted = torch.arange(size) if order is None else order.long().cpu()
                sources.append(batch.fetch(leaf, wanted, copied=False))
            else:
                sources.append(next(here))
        return sources

    def _beside(self, sources: list[Tensor], start: int, stop: int) -> Sequence[Any]:
        """What a layer reads beside the stream, for some of the slots."""
        if len(self.batch.selected) == 1:
            return ()
        return self.batch.of([source[start:stop] for source in sources])[1:]

    def _put(
        self, decision: Decision, leaving: list[Block], others: list[Block]
    ) -> tuple[list[Any], tree.Spec]:
        """What was made of the samples, in their order; the gate learns from it if it is to."""
        plan, blocks = decision.plan, [*leaving[::-1], *sorted(others, key=lambda b: b.start)]
        assert plan is not None
        size, count, labels = plan.num_rows, len(leaving), self.labels()
        columns, spec = checks.check_outputs(
            [block.output for block in blocks],
            [block.rows for block in blocks],
            [labels[block.depth] for block in blocks],
            plan.order.device,
        )
        starts = [block.start for block in blocks]
        if decision.grad is not None:
            other: Tensor | int = -1
            hidden = None
            if decision.exact:
                checks.check_entries(size * (1 + len(self.depths)))
                slots = plan.inverse + size
                other = torch.cat([slots + size * depth for depth in self.depths], 1)
                hidden = self._read
            index = torch.where(decision.selected, plan.inverse, other)
            probs = decision.probs
            assert probs is not None  # the gate learns through them
            return [
                movement.combine_selected(plan, column, starts, count, probs, index, hidden)
                for column in columns
            ], spec
        if count == 1:
            held = [*self.batch.held(), *(t for part in self.parts for t in part.buffers_held())]
            return [apart(column[0], held) for column in columns], spec
        return [movement.combine_rows(plan, column, starts) for column in columns], spec

    def _read(self) -> list[Tensor]:
        """What the rows without a graph were computed from."""
        return [tensor for part in self.parts for tensor in part.read_from(self.batch)]

    def _touch_starved(self, decision: Decision, combined: list[Any], left: set[int]) -> list[Any]:
        """Layers that nobody reached and heads where nobody left get zero gradients."""
        starved: list[Branch] = [*self.layers[max(left, default=0) :]]
        if self.heads is not None:
            starved += [head for depth, head in enumerate(self.heads) if depth not in left]
        probs = decision.probs
        hidden = (lambda: [probs]) if decision.exact and probs is not None else None
        return touch_starved(combined, starved, self.batch, hidden)
