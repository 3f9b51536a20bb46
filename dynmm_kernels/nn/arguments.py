"""What a branch is called with: its selected inputs, whole or only the rows of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .. import tree
from ..plan import RoutingPlan


class Arguments:
    """A branch's selected arguments, taken apart once and put together for any set of rows."""

    def __init__(self, selected: tuple[Any, ...], label: str) -> None:
        self.selected = selected
        self.label = label
        self.leaves, self.spec = tree.flatten(selected)
        self.rows = [i for i, leaf in enumerate(self.leaves) if tree.is_rows(leaf)]

    def tensors(self) -> list[Tensor]:
        """The per-sample leaves that are here already."""
        return [self.leaves[i] for i in self.rows if isinstance(self.leaves[i], Tensor)]

    def whole(self, num_rows: int) -> tuple[Any, ...]:
        """The arguments for the whole batch; no tensor is copied."""
        if all(isinstance(leaf, Tensor) for leaf in self.leaves):
            return self.selected
        indices = None
        rows = []
        for i in self.rows:
            leaf = self.leaves[i]
            if isinstance(leaf, tree.Lazy):
                indices = torch.arange(num_rows) if indices is None else indices
                leaf = self.fetch(leaf, indices)
            rows.append(leaf)
        return self.of(rows)

    def of(self, rows: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments with `rows` in place of the per-sample leaves."""
        if len(rows) == len(self.leaves):
            return tree.unflatten(rows, self.spec)
        leaves = [leaf.tensor if isinstance(leaf, tree.Shared) else leaf for leaf in self.leaves]
        for i, row in zip(self.rows, rows, strict=True):
            leaves[i] = row
        return tree.unflatten(leaves, self.spec)

    def fetch(self, lazy: tree.Lazy, indices: Tensor) -> Tensor:
        """The rows `indices` of a Lazy modality.

        Raises:
            ValueError: it did not return one row per index.
        """
        rows = lazy.fetch(indices)
        if not isinstance(rows, Tensor) or rows.ndim == 0 or rows.shape[0] != indices.numel():
            got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"branch {self.label}: Lazy was asked for {indices.numel()} rows and must return "
                f"a tensor with as many; got {got}"
            )
        return rows


def gather_arguments(
    plan: RoutingPlan, wanted: Iterable[tuple[int, Arguments]]
) -> list[tuple[Any, ...]]:
    """For each (branch, arguments): the arguments with only the branch's rows.

    All tensors of all branches move in one call; a branch that has every row moves nothing.
    """
    wanted = list(wanted)
    sources: list[Tensor] = []
    index_of: dict[int, int] = {}
    moves: list[tuple[int, int]] = []
    for branch, arguments in wanted:
        if plan.counts[branch] == plan.num_rows:
            continue
        for tensor in arguments.tensors():
            index = index_of.setdefault(id(tensor), len(sources))
            if index == len(sources):
                sources.append(tensor)
            moves.append((index, branch))
    gathered = iter(F.gather_rows(plan, sources, moves) if moves else ())
    results = []
    for branch, arguments in wanted:
        if plan.counts[branch] == plan.num_rows:
            results.append(arguments.whole(plan.num_rows))
            continue
        indices = None
        rows = []
        for i in arguments.rows:
            leaf = arguments.leaves[i]
            if isinstance(leaf, tree.Lazy):
                indices = plan.rows(branch).cpu() if indices is None else indices
                rows.append(arguments.fetch(leaf, indices))
            else:
                rows.append(next(gathered))
        results.append(arguments.of(rows))
    return results
