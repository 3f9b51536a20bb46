"""Decisions that are planned, so that no gate noise enters a timing; and modules that cost nothing.

Both stand in for a part of a fusion, in a copy of it that shares everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import tree
from ..nn.arguments import Arguments
from ..nn.branch import Branch, Branches
from ..nn.calling import joined
from ..nn.chooser import Chooser
from ..nn.routed.fusion import RoutedFusion
from ..nn.rules import rule_of

MARGIN = 2.0  # of planned logits, far from a saturated softmax


def planned_rows(
    shares: Sequence[float], rows: int, several: bool = False, seed: int = 0
) -> Tensor:
    """bool [N, B]: each branch on its share of the samples, shuffled.

    The shares of a branch each sum to the number of branches a sample takes, and every sample
    takes as many, unless `several`: then each branch draws its samples by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    if several:
        columns = [
            torch.randperm(rows, generator=generator) < round(share * rows) for share in shares
        ]
        return torch.stack(columns, 1)
    ranks = round(sum(shares))
    exact = [share * rows for share in shares]
    counts = [min(rows, int(count + 1e-9)) for count in exact]
    by_remainder = sorted(range(len(shares)), key=lambda b: counts[b] - exact[b])
    while sum(counts) < ranks * rows:
        for b in by_remainder:
            if counts[b] < rows and sum(counts) < ranks * rows:
                counts[b] += 1
    branch = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(counts))
    # Entry i goes to sample i modulo N, so that no sample has a branch twice.
    chosen = torch.zeros(rows, len(shares), dtype=torch.bool)
    chosen[torch.arange(len(branch)) % rows, branch] = True
    return chosen[torch.randperm(rows, generator=generator)]


class PlannedGate(nn.Module):
    """Runs the real gate, whose cost is paid and which learns, and answers as planned."""

    def __init__(self, gate: nn.Module, planned: Tensor) -> None:
        super().__init__()
        self.gate = gate
        self.planned = planned

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        real = self.gate(*inputs, **named)
        planned = self.planned.to(real)
        return planned + (real - real.detach()) if real.requires_grad else planned


class Free(nn.Module):
    """Costs nothing: answers with rows of what a branch returned for the whole batch.

    Args:
        branch: which it stands in for, and is treated alike.
        batch: what the fusion was called with.
        output: what the branch returned.
    """

    def __init__(self, branch: Branch, batch: Arguments, output: Any) -> None:
        super().__init__()
        leaves, self.spec = tree.flatten(output)
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.at = branch.arguments(batch).rows[0]
        self.inplace = branch.in_place
        self.norm = nn.ModuleList(nn.BatchNorm1d(1) for _ in branch.norms[:1])
        like = next((leaf for leaf in self.leaves if isinstance(leaf, Tensor)), None)
        self.unused = nn.Parameter(
            torch.zeros((), device=None if like is None else like.device),
            requires_grad=any(p.requires_grad for p in branch.parameters()),
        )
        self.train(branch.training)
        self.norm.train(any(norm.training for norm in branch.norms))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        arguments = tree.flatten(joined(inputs, named))[0]
        rows = arguments[self.at].shape[0]
        leaves = [leaf[:rows] if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        if torch.is_grad_enabled():
            read = [leaf for leaf in arguments if isinstance(leaf, Tensor) and leaf.requires_grad]
            leaves = [
                _Free.apply(leaf, self.unused, *read)
                if isinstance(leaf, Tensor) and leaf.is_floating_point()
                else leaf
                for leaf in leaves
            ]
        return tree.unflatten(leaves, self.spec)


class _Free(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, unused: Tensor, *read: Tensor) -> Tensor:
        ctx.shapes = [tensor.shape for tensor in read]
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        return None, grad.new_zeros(()), *[grad.new_zeros(()).expand(s) for s in ctx.shapes]


def answers(fusion: RoutedFusion, chosen: Tensor) -> Tensor:
    """What the gate must return for the samples to take the branches `chosen`, bool [N, B]."""
    ones = chosen.float()
    if fusion.gate_returns == "weights":
        return ones
    logits = MARGIN * (2 * ones - 1)
    if fusion.gate_returns == "logits":
        return logits
    return rule_of(fusion.select, chosen.shape[1]).probs(logits, 1.0)


def twin(
    fusion: RoutedFusion,
    execution: str,
    gate: nn.Module | None = None,
    branches: Sequence[nn.Module] = (),
) -> RoutedFusion:
    """The fusion with a gate or branches in the place of its own, and an execution of its own."""
    other = copy.copy(fusion)
    other._modules = {**fusion._modules}
    other.chooser = Chooser()
    other.captured = None
    other.execution = execution
    if gate is not None:
        other.gate = gate  # type: ignore[assignment]  # it becomes a Branch
        other.noise = None
    if branches:
        pairs = zip(fusion.branches.all(), branches, strict=True)
        stood_in = [Branch(new, old.inputs, old.name) for old, new in pairs]
        for branch in stood_in:
            branch.training = fusion.training
        other.branches = Branches(stood_in)
    return other
