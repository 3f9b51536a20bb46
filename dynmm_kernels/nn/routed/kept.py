"""What each branch says of each sample, side by side, where it is not summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional import checks, movement, selecting, tree
from ...functional.filled import LEAST, fill
from ..arguments import Arguments
from ..branch import Branch, forward_only
from ..decision import Decision, blend, sum_losses
from ..rules import as_column
from .execution import Rest, Result, Routed, run_rows
from .steady import Steady


class Kept(NamedTuple):
    """How outputs are kept apart: "stack", "concat" or "dict", and what stands where none is."""

    kind: str
    value: float

    def check(
        self,
        branches: Sequence[Branch],
        outputs: Sequence[Any],
        rows: Sequence[int],
        device: torch.device,
    ) -> list[tuple[list[Any], tree.Spec]]:
        """The leaves of each of the outputs, and their structure; by name every branch has its own.

        `branches`: whose the outputs are; a branch may have several.
        """
        places: dict[Any, list[int]] = {}
        for i, branch in enumerate(branches):
            places.setdefault(branch if self.kind == "dict" else None, []).append(i)
        parts: list[Any] = [None] * len(outputs)
        for group in places.values():
            columns, spec = checks.check_outputs(
                [outputs[i] for i in group],
                [rows[i] for i in group],
                [branches[i].label for i in group],
                device,
                widths=self.kind == "concat",
            )
            for at, i in enumerate(group):
                parts[i] = [column[at] for column in columns], spec
        return parts

    def fill(self, output: Tensor, weights: Tensor) -> Tensor:
        """weight * output, which is given, + (1 - weight) * value; `weights`: of the samples."""
        value = self._value(output.dtype)
        if not value:
            return output
        weights = as_column(weights, output)
        if movement.carries_gradient(output):
            return (output + (1 - weights) * value).to(output.dtype)
        return output.masked_fill(weights == 0, value)

    def absent(self, like: Any, num_rows: int) -> Any:
        """What stands for a branch that ran for nobody, whose leaf is `like` but for the rows."""
        if not isinstance(like, Tensor):
            return like
        if not like.ndim:
            return like.new_zeros(())
        return like.new_full((num_rows, *like.shape[1:]), self._value(like.dtype))

    def _value(self, dtype: torch.dtype) -> float:
        whole = not (dtype.is_floating_point or dtype.is_complex)
        if whole and self.value != (bool if dtype == torch.bool else int)(self.value):
            raise TypeError(f"outputs of {dtype} cannot be filled with {self.value}")
        return self.value

    def join(self, parts: Sequence[tuple[list[Any], tree.Spec]], names: Sequence[str]) -> Any:
        """The result, of one part [N, ...] for every branch."""
        if self.kind == "dict":
            return {n: tree.unflatten(*part) for n, part in zip(names, parts, strict=True)}
        columns = zip(*(leaves for leaves, _ in parts), strict=True)
        return tree.unflatten([self._join_leaf(column) for column in columns], parts[0][1])

    def _join_leaf(self, column: Sequence[Any]) -> Any:
        if not isinstance(column[0], Tensor):
            return column[0]
        if not column[0].ndim:
            return sum_losses(column)
        column = movement.same_dtype(column)
        return torch.stack([*column], 1) if self.kind == "stack" else torch.cat([*column], 1)


def run_whole(
    kept: Kept,
    selects: bool,
    branches: Sequence[Branch],
    batch: Arguments,
    decision: Decision,
) -> Result:
    """Every branch on every sample, as `run_everywhere` and, if it `selects`, `run_selecting`."""
    multipliers = decision.multipliers()
    num_rows = multipliers.shape[0]
    rows_run = (num_rows,) * len(branches)
    outputs = [branch.call_whole(batch, num_rows) for branch in branches]
    given = kept.check(branches, outputs, rows_run, multipliers.device)

    def place(b: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.ndim:
            return _loss(b, leaf, decision)
        weights = decision.fitting(multipliers, [leaf])[:, b : b + 1]
        if not (selects and movement.carries_gradient(leaf)):
            output = blend([leaf], weights, decision.soft)
        else:
            output = _select(leaf, weights, decision)
        return kept.fill(output, weights)

    parts = [([place(b, leaf) for leaf in leaves], spec) for b, (leaves, spec) in enumerate(given)]
    return kept.join(parts, [str(branch.name) for branch in branches]), rows_run


def _loss(b: int, loss: Tensor, decision: Decision) -> Tensor:
    """An auxiliary loss, where somebody chose its branch."""
    chosen = decision.chosen
    return loss.clone() if chosen is None else torch.where(chosen[b], loss, 0)


def _select(leaf: Tensor, weights: Tensor, decision: Decision) -> Tensor:
    """weights * leaf, [N, 1] and [N, ...], but zeros where it was not chosen, nan or not."""
    chosen = weights.detach() != 0

    def write(out: Tensor | None = None) -> Tensor:
        return selecting.select([leaf], chosen, True, out)

    if decision.grad is not None:
        return selecting.select_learning([leaf], weights, write)
    if decision.rank_weights is None:
        return write()
    weighted = as_column(weights, leaf) * leaf
    return selecting.select([weighted], chosen, True).to(leaf.dtype)


class RoutedApart(Routed):
    """`Routed` that puts each branch's rows in sample order for themselves."""

    def __init__(self, kept: Kept, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept = kept
        self.probed: list[int] = []  # called for nobody

    def run(self) -> Result:
        output, counts = super().run()
        probed = {*self.probed} - {*self.whole}
        return output, tuple([LEAST if b in probed else n for b, n in enumerate(counts)])

    def _combine(self, outputs: list[Any]) -> tuple[list[Any], tree.Spec]:
        return self._keep(outputs, None)

    def _learn(self, outputs: list[Any], rest: Rest | None) -> tuple[list[Any], tree.Spec]:
        return self._keep(outputs, rest)

    def _keep(self, outputs: list[Any], rest: Rest | None) -> tuple[list[Any], tree.Spec]:
        plan = self.plan
        owners, rows = [*self.own], [plan.counts[b] for b in self.own]
        starts = [plan.starts[b] for b in self.own]
        if rest is not None:
            last = plan.order.shape[0]  # the slots of the rest stand behind those of the plan
            owners, rows, outputs = owners + rest.branches, rows + rest.rows, outputs + rest.outputs
            starts += [start + last for start in rest.starts]
        heard = {*owners}
        if self.kept.kind != "stack":
            self.probed = [b for b in range(len(self.branches)) if b not in heard]
            owners, rows = owners + self.probed, rows + [LEAST] * len(self.probed)
            outputs = outputs + self._probe()
        branches = [self.branches[b] for b in owners]
        given = self.kept.check(branches, outputs, rows, plan.order.device)
        weights = self.decision.multipliers() if self.kept.value else None
        index = self._index(rest)
        parts = []
        for b in range(len(self.branches)):
            mine = [i for i, owner in enumerate(owners) if owner == b] or [0]
            leaves, spec = given[mine[0]]
            if b in heard:
                columns = [*zip(*(given[i][0] for i in mine), strict=True)]
                at = [starts[i] for i in mine]
                leaves = [self._place(b, [*column], at, index, weights) for column in columns]
            else:
                leaves = [self.kept.absent(leaf, plan.num_rows) for leaf in leaves]
                leaves = movement.touch(leaves, self._weights_followed())
            if b not in self.own:
                leaves = super()._touch_starved(leaves, [b])
            parts.append((leaves, spec))
        return tree.flatten(self.kept.join(parts, [str(branch.name) for branch in self.branches]))

    def _touch_starved(self, combined: list[Any], starved: Sequence[int]) -> list[Any]:
        """Each part was touched for itself."""
        return combined

    def _weights_followed(self) -> list[Tensor]:
        """What gives the weights a graph, of zeros, too, where the gate learns."""
        weights = self.decision.rank_weights
        if weights is None and self.decision.grad is not None:
            weights = self.decision.probs
        return [] if weights is None else [weights]

    def _index(self, rest: Rest | None) -> Tensor | None:
        """int32 [N, B]: the slot of what each branch says of each sample, where the gate learns."""
        if self.decision.grad is None:
            return None
        other: Tensor | int = -1
        if rest is not None:
            other = rest.slots + self.plan.order.shape[0]
        return torch.where(self.selected, self.plan.inverse, other)

    def _place(
        self,
        b: int,
        column: list[Any],
        starts: list[int],
        index: Tensor | None,
        weights: Tensor | None,
    ) -> Any:
        """One leaf of a branch in sample order: of its own samples, and behind them of the rest."""
        first, own = column[0], b in self.own
        if not isinstance(first, Tensor):
            return first
        if not first.ndim:
            return _loss(b, first, self.decision) if own else first.new_zeros(())
        if not own:  # everybody is of the rest
            column, starts = [first[:0], *column], [self.plan.starts[b], *starts]
        if index is None or not movement.carries_gradient(first):
            placed = self._move(column[0], starts[:1])
        else:
            placed = self._move_learning(b, column, starts, index)
        return placed if weights is None else self.kept.fill(placed, weights[:, b])

    def _move(self, rows: Tensor, starts: list[int]) -> Tensor:
        weights, flags = self.decision.rank_weights, rows.dtype == torch.bool
        rows = rows.to(torch.uint8) if flags else rows
        placed = movement.combine_rows(self.plan, [rows], starts, weights)
        return placed.bool() if flags else placed

    def _move_learning(self, b: int, column: list[Any], starts: list[int], index: Tensor) -> Tensor:
        mine = torch.arange(index.shape[1], device=index.device) == b
        probs, slots = self.decision.probs, torch.where(mine, index, -1)
        assert probs is not None  # the gate learns through them
        hidden = None if len(column) == 1 else lambda: self.branches[b].read_from(self.batch)
        return movement.combine_selected(self.plan, column, starts, 1, probs, slots, hidden)

    def _probe(self) -> list[Any]:
        """What branches nobody chose return, for its structure and shapes; without a graph."""
        if not self.probed:
            return []
        (plan,) = fill([self.plan], LEAST)
        with forward_only(self.branches[b] for b in self.probed):
            return run_rows(self.branches, self.batch, plan, self.probed, self.whole)


class SteadyApart(RoutedApart, Steady):
    """`Steady` likewise."""
