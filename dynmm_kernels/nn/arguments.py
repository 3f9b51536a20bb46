"""What a module is called with: its selected inputs, whole or only the rows of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import movement, tree
from ..functional.plan import RoutingPlan
from .notes import note_origin


class Arguments:
    """Arguments taken apart once, to be put together for any set of rows.

    Attributes:
        selected: the arguments as they came.
        leaves, spec: the same, flat.
        rows: positions of the per-sample leaves.
        num_rows: N; None where only Lazy leaves, or none, are per sample.
        device: of the tensors; None where there are none.
        parts: what modules have selected of them, by module and whether a graph is recorded.

    Raises:
        ValueError: leaves that disagree on N. TypeError: leaves that cannot be split by row.
    """

    __slots__ = (
        *("device", "label", "leaves", "num_rows", "parts", "plain", "rows", "selected", "spec"),
    )

    def __init__(self, selected: tuple[Any, ...], label: str, num_rows: int | None = None) -> None:
        self.selected = selected
        self.label = label
        self.parts: dict[tuple[Any, bool], Arguments] = {}
        self.leaves, self.spec = tree.flatten(selected)
        self.rows, self.num_rows, self.device = tree.find_rows(self.leaves, label, num_rows)
        self.plain = tree.is_flat(self.spec) and len(self.rows) == len(self.leaves)

    def tensors(self) -> list[Tensor]:
        """The per-sample leaves that are here already."""
        if self.plain:
            return self.leaves
        return [self.leaves[i] for i in self.rows if isinstance(self.leaves[i], Tensor)]

    def rows_at_hand(self) -> list[int] | None:
        """`rows`; None where some of them are Lazy."""
        if self.plain or not any(isinstance(self.leaves[i], tree.Lazy) for i in self.rows):
            return self.rows
        return None

    def held(self) -> list[Tensor]:
        """Every tensor that is here already, `Shared` ones too."""
        return self.leaves if self.plain else tree.tensors_in(self.leaves)

    def whole(self, num_rows: int | None, copied: bool = False) -> tuple[Any, ...]:
        """The arguments for the whole batch: the caller's own tensors, unless they are `copied`."""
        if self.plain and not copied:
            return self.selected
        copies: dict[Any, Tensor] = {}
        key_of = tree.identity()
        rows = []
        for i in self.rows:
            leaf = self.leaves[i]
            if isinstance(leaf, tree.Lazy):
                if num_rows is None:
                    raise ValueError(
                        f"{self.label}: with Lazy inputs alone the number of samples is unknown; "
                        "pass a tensor as well, or a choice as a LongTensor [N]"
                    )
                leaf = self.fetch(leaf, torch.arange(num_rows), copied)
            elif copied:
                key = key_of(leaf)
                if key not in copies:
                    copies[key] = leaf.clone()
                leaf = copies[key]
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

    def fetch(self, lazy: tree.Lazy, indices: Tensor, copied: bool) -> Tensor:
        """The rows `indices` of a Lazy modality; `copied`, for they may be its own store.

        Raises:
            ValueError: it did not return one row per index.
        """
        wanted = indices.numel()
        try:
            rows = lazy.fetch(indices)
        except Exception as error:
            note_origin(error, self.label)
            raise
        if not isinstance(rows, Tensor) or rows.ndim == 0 or rows.shape[0] != wanted:
            got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"{self.label}: Lazy was asked for {wanted} rows and must return a tensor with as "
                f"many; got {got}"
            )
        return rows.clone() if copied else rows


def gather_arguments(
    plan: RoutingPlan,
    branches: Sequence[int],
    arguments: Sequence[Arguments],
    copied: Sequence[bool],
) -> list[tuple[Any, ...]]:
    """For each of the arguments, these with the rows of one of the plan's branches.

    All tensors move in one call; what is read twice of the same rows (q = k = v) moves once and
    stays one tensor.

    Args:
        branches: of the plan, one for each of the `arguments`.
        copied: whether who gets them may write into them.
    """
    first, size = arguments[0], len(arguments[0].leaves)
    alike = first.plain and all(own is first for own in arguments)
    if alike and 1 < len(branches) == len({*branches}):
        # The common case: every branch reads the same flat tensors.
        every = [i for _ in branches for i in range(size)]
        rows = movement.gather_rows(
            plan, first.leaves, every, [b for b in branches for _ in range(size)]
        )
        return [tuple(rows[i : i + size]) for i in range(0, len(rows), size)]

    sources: list[Tensor] = []
    index_of: dict[Any, int] = {}
    index: list[int] = []
    owner: list[int] = []
    moved: dict[int, dict[Any, int]] = {}  # of each branch's rows: where a tensor's are
    places = []
    key_of = tree.identity()
    for branch, own in zip(branches, arguments, strict=True):
        place_of = moved.setdefault(branch, {})
        for tensor in own.tensors():
            key = key_of(tensor)
            if key not in place_of:
                place_of[key] = len(index)
                index.append(index_of.setdefault(key, len(sources)))
                owner.append(branch)
                if index[-1] == len(sources):
                    sources.append(tensor)
        places.append(place_of)
    gathered = movement.gather_rows(plan, sources, index, owner) if index else []
    return [
        own.of(_rows_of(own, plan, branch, gathered, place_of, writes))
        for branch, own, place_of, writes in zip(branches, arguments, places, copied, strict=True)
    ]


def _rows_of(
    own: Arguments,
    plan: RoutingPlan,
    branch: int,
    gathered: Sequence[Tensor],
    place_of: dict[Any, int],
    copied: bool,
) -> list[Tensor]:
    """The branch's per-sample leaves: gathered already, or fetched now."""
    indices = None
    key_of = tree.identity()
    rows = []
    for i in own.rows:
        leaf = own.leaves[i]
        if isinstance(leaf, tree.Lazy):
            indices = plan.rows(branch).cpu() if indices is None else indices
            rows.append(own.fetch(leaf, indices.clone(), copied))
        else:
            rows.append(gathered[place_of[key_of(leaf)]])
    return rows
