"""What a module is called with: its selected inputs, whole or only the rows of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .. import tree
from ..plan import RoutingPlan


class Arguments:
    """Arguments taken apart once, to be put together for any set of rows.

    Attributes:
        selected: the arguments as they came.
        leaves, spec: the same, flat.
        rows: positions of the per-sample leaves.
        num_rows: N; None where only Lazy leaves, or none, are per sample.

    Raises:
        ValueError: leaves that disagree on N. TypeError: leaves that cannot be split by row.
    """

    __slots__ = ("label", "leaves", "num_rows", "plain", "rows", "selected", "spec")

    def __init__(self, selected: tuple[Any, ...], label: str, num_rows: int | None = None) -> None:
        self.selected = selected
        self.label = label
        self.leaves, self.spec = tree.flatten(selected)
        self.rows, self.num_rows = tree.find_rows(self.leaves, label, num_rows)
        self.plain = tree.is_flat(self.spec) and len(self.rows) == len(self.leaves)

    def tensors(self) -> list[Tensor]:
        """The per-sample leaves that are here already."""
        if self.plain:
            return self.leaves
        return [self.leaves[i] for i in self.rows if isinstance(self.leaves[i], Tensor)]

    def whole(self, num_rows: int | None, copied: bool = False) -> tuple[Any, ...]:
        """The arguments for the whole batch: the caller's own tensors, unless they are `copied`."""
        if self.plain and not copied:
            return self.selected
        indices = None
        rows = []
        for i in self.rows:
            leaf = self.leaves[i]
            if isinstance(leaf, tree.Lazy):
                if num_rows is None:
                    raise ValueError(
                        f"{self.label}: with Lazy inputs alone the number of samples is unknown; "
                        "pass a tensor as well, or a choice as a LongTensor [N]"
                    )
                indices = torch.arange(num_rows) if indices is None else indices
                leaf = self.fetch(leaf, indices)
            elif copied:
                leaf = leaf.clone()
            rows.append(leaf)
        return self.of(rows)

    def of(self, rows: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments with `rows` in place of the per-sample leaves."""
        if self.plain:
            return tuple(rows)
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
                f"{self.label}: Lazy was asked for {indices.numel()} rows and must return a "
                f"tensor with as many; got {got}"
            )
        return rows


def gather_arguments(
    plan: RoutingPlan, branches: Sequence[int], arguments: Sequence[Arguments]
) -> list[tuple[Any, ...]]:
    """For each branch its arguments with only its own rows.

    All tensors of all branches move in one call.
    """
    first, size = arguments[0], len(arguments[0].leaves)
    if len(branches) > 1 and first.plain and all(own is first for own in arguments):
        # The common case: every branch reads the same flat tensors.
        index = [i for _ in branches for i in range(size)]
        rows = F.gather_rows(plan, first.leaves, index, [b for b in branches for _ in range(size)])
        return [tuple(rows[i : i + size]) for i in range(0, len(rows), size)]

    sources: list[Tensor] = []
    index_of: dict[int, int] = {}
    index, owner = [], []
    for branch, own in zip(branches, arguments, strict=True):
        for tensor in own.tensors():
            position = index_of.setdefault(id(tensor), len(sources))
            if position == len(sources):
                sources.append(tensor)
            index.append(position)
            owner.append(branch)
    gathered = iter(F.gather_rows(plan, sources, index, owner) if index else ())
    return [
        own.of(_next_rows(own, gathered, plan, branch))
        for branch, own in zip(branches, arguments, strict=True)
    ]


def _next_rows(
    own: Arguments, gathered: Iterator[Tensor], plan: RoutingPlan, branch: int
) -> list[Tensor]:
    """The branch's per-sample leaves: gathered already, or fetched now."""
    indices = None
    rows = []
    for i in own.rows:
        if isinstance(own.leaves[i], tree.Lazy):
            indices = plan.rows(branch).cpu() if indices is None else indices
            rows.append(own.fetch(own.leaves[i], indices))
        else:
            rows.append(next(gathered))
    return rows
