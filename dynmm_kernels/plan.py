"""RoutingPlan: one decision, used by every tensor and every layer that shares it."""

from __future__ import annotations

from torch import Tensor


class RoutingPlan:
    """Which samples go to which branch, sorted by branch. Made by `route`; not to be changed.

    An entry is (row n, rank j), flat index n*k + j. Slots are the entries that have a branch,
    sorted by branch, stable in the entry.

    Attributes:
        order: int32 [N*k], slot -> entry; the tail behind the last slot is -1.
        inverse: int32 [N, k], entry -> slot, or -1 for an entry with no branch.
        header: int32 [B+3], the B+1 offsets, then the number of faulty entries and the first one.
        num_branches: B.
        num_rows: N, the number of samples.
        ranks: k, the number of entries per sample.
    """

    __slots__ = (
        "_counts",
        "_host",
        "header",
        "inverse",
        "num_branches",
        "num_rows",
        "order",
        "ranks",
    )

    def __init__(
        self,
        order: Tensor,
        inverse: Tensor,
        header: Tensor,
        num_branches: int,
        host_header: list[int] | None = None,
    ) -> None:
        self.order = order
        self.inverse = inverse
        self.header = header
        self.num_branches = num_branches
        self.num_rows, self.ranks = inverse.shape
        self._host = host_header
        self._counts: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"RoutingPlan(num_rows={self.num_rows}, ranks={self.ranks}, counts={self.counts})"

    @property
    def offsets(self) -> Tensor:
        """int32 [B+1]: branch b owns the slots offsets[b] to offsets[b+1]."""
        return self.header[: self.num_branches + 1]

    @property
    def host_header(self) -> list[int]:
        """The header on the host: the one synchronisation of a plan."""
        if self._host is None:
            self._host = self.header.tolist()
        return self._host

    @property
    def starts(self) -> tuple[int, ...]:
        """The B+1 offsets on the host."""
        return tuple(self.host_header[:-2])

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows per branch, on the host."""
        if self._counts is None:
            starts = self.host_header
            self._counts = tuple([starts[b + 1] - starts[b] for b in range(self.num_branches)])
        return self._counts

    @property
    def faults(self) -> tuple[int, int]:
        """How many entries were faulty, and the first of them (-1: none)."""
        count, first = self.host_header[-2:]
        return count, first

    def rows(self, branch: int) -> Tensor:
        """int64 [n_b]: the samples of `branch`, ascending."""
        entries = self.order[self.starts[branch] : self.starts[branch + 1]].long()
        return entries if self.ranks == 1 else entries // self.ranks
