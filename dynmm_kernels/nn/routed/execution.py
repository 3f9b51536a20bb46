"""The two ways to run the branches of one decision: everywhere, or each on its own samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...functional import checks, movement, sorting, tree
from ...functional.filled import FilledPlan
from ...functional.plan import RoutingPlan
from ..arguments import Arguments, gather_arguments
from ..branch import Branch, forward_only
from ..decision import Decision, sum_losses
from ..memory import apart, versions

Result = tuple[Any, tuple[int, ...]]  # the output, and the rows that each branch processed


def run_everywhere(branches: Sequence[Branch], batch: Arguments, decision: Decision) -> Result:
    """Every branch on every sample, then the weighted sum: what DynMM's own code does."""
    num_rows = decision.num_rows
    outputs = [branch.call_whole(batch, num_rows) for branch in branches]
    combined = blend_outputs(outputs, [branch.label for branch in branches], decision)
    return combined, (num_rows,) * len(outputs)


def blend_outputs(outputs: Sequence[Any], labels: Sequence[str], decision: Decision) -> Any:
    """The weighted sum of what was made of every sample; `labels` are for messages."""
    multipliers = decision.multipliers()
    rows, device = (multipliers.shape[0],) * len(outputs), multipliers.device
    if checks.single_tensors_fit(outputs, rows, device):
        return decision.blend(outputs, multipliers)
    columns, spec = checks.check_outputs(outputs, rows, labels, device)
    return tree.unflatten([decision.blend(column, multipliers) for column in columns], spec)


class Rest(NamedTuple):
    """What the branches say of the samples they were not chosen for.

    Attributes:
        slots: int32 [N, B], where a branch's row of a sample stands behind those of the plan.
        starts: of the outputs, counted likewise.
    """

    branches: list[int]
    outputs: list[Any]
    rows: list[int]
    starts: list[int]
    slots: Tensor


class Routed:
    """Each branch on the samples that chose it; at least one sample chose one.

    Where the gate's exact gradient is recorded, the other samples follow without a graph.

    Attributes:
        own: the branches that were chosen.
        whole: outputs for the whole batch, of branches whose BatchNorm needs it.
        selected: bool [N, B], where the gate learns.
    """

    __slots__ = ("batch", "branches", "decision", "own", "plan", "selected", "whole")

    plan: RoutingPlan
    selected: Tensor
    steady = False  # whether all branches are called, on rows that were gathered

    def __init__(
        self,
        branches: Sequence[Branch],
        batch: Arguments,
        decision: Decision,
        subset_norm: bool,
    ) -> None:
        assert decision.plan is not None
        self.branches = branches
        self.batch = batch
        self.decision = decision
        self.plan = decision.plan
        self.own = [b for b, count in enumerate(self.plan.counts) if count]
        self.whole = {} if subset_norm else self._run_coupled()

    def run(self) -> Result:
        counts, size = self.plan.counts, self.plan.num_rows
        exact, learns = self.decision.exact, self.decision.grad is not None
        if learns:
            self.selected = self.decision.selected
        rest: Rest | None
        if exact and self._are_mirrored():
            outputs, rest = self._run_mirrored()
        else:
            rest = self._run_rest() if exact else None  # before a graph holds memory
            outputs = self._run_rows(self.plan, self.own)
        if learns:
            combined, spec = self._learn(outputs, rest)
        else:
            combined, spec = self._combine(outputs)
        if len(self.own) < len(self.branches) and torch.is_grad_enabled():
            starved = [b for b in range(len(self.branches)) if b not in self.own]
            combined = self._touch_starved(combined, starved)
        if exact:
            counts = (size,) * len(self.branches)
        elif self.whole:
            counts = tuple(size if b in self.whole else n for b, n in enumerate(counts))
        return tree.unflatten(combined, spec), counts

    def _run_coupled(self) -> dict[int, Any]:
        size, whole = self.plan.num_rows, {}
        for b, branch in enumerate(self.branches):
            if branch.couples_samples():
                output = branch.call_whole(self.batch, size)
                checks.check_outputs([output], [size], [branch.label], self.plan.order.device)
                whole[b] = output
        return whole

    def _run_rows(self, plan: RoutingPlan, wanted: Sequence[int]) -> list[Any]:
        return run_rows(self.branches, self.batch, plan, wanted, self.whole)

    def _run_rest(self) -> Rest:
        """Forward only: the gradient of these outputs is zero."""
        plan = sorting.route_complement(self.plan, self.selected)
        rest = [b for b, count in enumerate(plan.counts) if count]
        with forward_only(self.branches[b] for b in rest):
            outputs = self._run_rows(plan, rest)
        rows, starts = [plan.counts[b] for b in rest], [plan.starts[b] for b in rest]
        return Rest(rest, outputs, rows, starts, plan.inverse)

    def _are_mirrored(self) -> bool:
        """Whether one branch's samples are the rest of the other, and nobody writes into them."""
        return (
            len(self.own) == len(self.branches) == 2
            and self.plan.ranks == 1
            and not self.whole
            and self.plan.starts[2] == self.plan.num_rows
            and not any(branch.in_place for branch in self.branches)
        )

    def _run_mirrored(self) -> tuple[list[Any], Rest]:
        """As `_run_rows` and `_run_rest`, of rows that were gathered once."""
        plan, branches = self.plan, self.branches
        first, second = (branch.arguments(self.batch) for branch in branches)
        mine = (first, second)
        chosen = gather_arguments(plan, [0, 1, 0, 1], [*mine, second, first], [False] * 4)
        own, mirrored = chosen[:2], chosen[2:]  # the latter of the samples of 0, then of 1
        tensors = tree.tensors_in(tree.flatten(mirrored)[0])
        before = versions(tensors)
        with forward_only(branches):
            rest = [branches[1].call(mirrored[0]), branches[0].call(mirrored[1])]
        if versions(tensors) != before:  # somebody wrote there after all
            own = gather_arguments(plan, [0, 1], mine, [False] * 2)
        outputs = [branch.call(rows) for branch, rows in zip(branches, own, strict=True)]
        counts, starts = [*plan.counts], [*plan.starts[:2]]
        return outputs, Rest([1, 0], rest, counts, starts, plan.inverse.expand(-1, 2))

    def _combine(self, outputs: list[Any]) -> tuple[list[Any], tree.Spec]:
        plan, own, weights = self.plan, self.own, self.decision.rank_weights
        rows, device = [plan.counts[b] for b in own], plan.order.device
        if checks.single_tensors_fit(outputs, rows, device):
            columns, spec = [tuple(outputs)], None
        else:
            labels = [self.branches[b].label for b in own]
            columns, spec = checks.check_outputs(outputs, rows, labels, device)
        if not self.steady and rows == [plan.num_rows] and weights is None and plan.ranks == 1:
            held = [*self.batch.held(), *self.branches[own[0]].buffers_held()]
            return [apart(column[0], held) for column in columns], spec
        header = plan.host_header
        starts = [header[b] for b in own]
        combined = [
            self._total(column)
            if spec is not None and tree.is_scalar(column[0])
            else movement.combine_rows(plan, column, starts, weights)
            for column in columns
        ]
        return combined, spec

    def _total(self, losses: Sequence[Tensor]) -> Tensor:
        """Of the branches that somebody chose."""
        return sum_losses(losses)

    def _learn(self, outputs: list[Any], rest: Rest | None) -> tuple[list[Any], tree.Spec]:
        """Combines `outputs` so that the gate learns, also from the `rest` where there is one."""
        plan, own, probs = self.plan, self.own, self.decision.probs
        branches, rows = [self.branches[b] for b in own], [plan.counts[b] for b in own]
        starts, hidden = [plan.starts[b] for b in own], None
        batch = self.batch
        other: Tensor | int = -1
        if rest is not None:
            last = plan.order.shape[0]  # the slots of the rest stand behind those of the plan
            others = [self.branches[b] for b in rest.branches]
            branches, outputs = branches + others, outputs + rest.outputs
            rows += rest.rows
            starts += [start + last for start in rest.starts]
            other = rest.slots + last

            def hidden() -> list[Tensor]:
                return [tensor for branch in others for tensor in branch.read_from(batch)]

        index = torch.where(self.selected, plan.inverse, other)
        assert probs is not None  # the gate learns through them
        labels = [branch.label for branch in branches]
        columns, spec = checks.check_outputs(outputs, rows, labels, plan.order.device)
        combined = [
            self._total(column[: len(own)])
            if tree.is_scalar(column[0])
            else movement.combine_selected(plan, column, starts, len(own), probs, index, hidden)
            for column in columns
        ]
        return combined, spec

    def _touch_starved(self, combined: list[Any], starved: Sequence[int]) -> list[Any]:
        """With the exact gradient of the gate even the zeros depend on its probabilities."""
        probs = self.decision.probs
        hidden = (lambda: [probs]) if self.decision.exact and probs is not None else None
        return touch_starved(combined, [self.branches[b] for b in starved], self.batch, hidden)


def touch_starved(
    combined: list[Any],
    starved: Sequence[Branch],
    batch: Arguments,
    hidden: Callable[[], Sequence[Tensor]] | None = None,
) -> list[Any]:
    """Parameters and inputs of branches nobody chose get zero gradients, as when masked."""
    tensors = [tensor for branch in starved for tensor in branch.read_from(batch)]
    sparse = {
        id(part.weight)
        for branch in starved
        for part in branch.modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse
    }
    return movement.touch(combined, tensors, hidden, sparse)


def run_rows(
    branches: Sequence[Branch],
    batch: Arguments,
    plan: RoutingPlan,
    wanted: Sequence[int],
    whole: dict[int, Any],
) -> list[Any]:
    """The outputs of the branches `wanted` for the rows that `plan` gives them.

    `whole`: outputs for the whole batch that are there already.
    """
    size, counts = plan.num_rows, plan.counts
    everyone = -1 if isinstance(plan, FilledPlan) else size
    alone = [b for b in wanted if b not in whole and counts[b] != everyone]
    arguments: list[tuple[Any, ...]] = []
    own: list[Arguments] = []
    if alone:
        own = [branches[b].arguments(batch) for b in alone]
        copied = [branches[b].in_place for b in alone]
        arguments = gather_arguments(plan, alone, own, copied)
        arguments.reverse()
        own.reverse()
    outputs = []
    for b in wanted:
        if b in whole:
            outputs.append(_rows_of(plan, b, whole[b]))
        elif counts[b] == everyone:
            outputs.append(branches[b].call_whole(batch, size))
        else:
            rows = own.pop().rows_at_hand()
            outputs.append(branches[b].call(arguments.pop(), rows))  # freed once used
    return outputs


def _rows_of(plan: RoutingPlan, branch: int, output: Any) -> Any:
    """A branch's own rows out of its output for the whole batch."""
    leaves, spec = tree.flatten(output)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim]
    sources, order = [leaves[i] for i in tensors], range(len(tensors))
    rows = movement.gather_rows(plan, sources, order, [branch] * len(tensors)) if tensors else []
    for i, gathered in zip(tensors, rows, strict=True):
        leaves[i] = gathered
    return tree.unflatten(leaves, spec)
