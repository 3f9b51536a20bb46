"""RoutingPlan: one decision, used by every tensor and every layer that shares it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Which samples go to which branch, sorted by branch.

    An entry is (row n, rank j), flat index n*k + j. Slots are the entries that have a branch,
    sorted by branch, stable in the entry.

    Attributes:
        order: int32 [N*k], slot -> entry; the tail behind the last slot is -1.
        inverse: int32 [N, k], entry -> slot, or -1 for an entry with no branch.
        header: int32 [B+3], the B+1 offsets, then the number of faulty entries and the first one.
        num_branches: B.
    """

    order: Tensor
    inverse: Tensor
    header: Tensor
    num_branches: int

    @property
    def num_rows(self) -> int:
        """N, the number of samples."""
        return self.inverse.shape[0]

    @property
    def ranks(self) -> int:
        """k, the number of entries per sample."""
        return self.inverse.shape[1]

    @property
    def offsets(self) -> Tensor:
        """int32 [B+1]: branch b owns the slots offsets[b] to offsets[b+1]."""
        return self.header[: self.num_branches + 1]

    @cached_property
    def host_header(self) -> tuple[int, ...]:
        """The header on the host: the one synchronisation of a plan."""
        return tuple(self.header.tolist())

    @property
    def starts(self) -> tuple[int, ...]:
        """The B+1 offsets on the host."""
        return self.host_header[:-2]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows per branch, on the host."""
        starts = self.host_header
        return tuple(starts[b + 1] - starts[b] for b in range(self.num_branches))

    @property
    def faults(self) -> tuple[int, int]:
        """How many entries were faulty, and the first of them (-1: none)."""
        return self.host_header[-2], self.host_header[-1]

    def rows(self, branch: int) -> Tensor:
        """int64 [n_b]: the samples of `branch`, ascending."""
        entries = self.order[self.starts[branch] : self.starts[branch + 1]].long()
        return entries if self.ranks == 1 else entries // self.ranks
