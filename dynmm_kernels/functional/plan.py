"""RoutingPlan: one decision, used by every tensor and every layer that shares it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.schemas import FAULTS


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
        traced: whether it is part of a graph, in which counts are symbols.
        lent: the slot from which on the whole batch stands in its own order; None: nowhere.
    """

    traced = False
    lent: int | None = None
    __slots__ = (
        "_check",
        "_counts",
        "_host",
        "_read",
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
        self._check: Callable[[RoutingPlan], None] | None = None
        self._read: Callable[[], list[int]] | None = None
        self._counts: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"RoutingPlan(num_rows={self.num_rows}, ranks={self.ranks}, counts={self.counts})"

    @property
    def offsets(self) -> Tensor:
        """int32 [B+1]: branch b owns the slots offsets[b] to offsets[b+1]."""
        return self.header[: self.num_branches + 1]

    @property
    def host_header(self) -> list[int]:
        """The header on the host: the one synchronisation of a plan.

        Raises:
            ValueError: what was decided is at fault: `route` was given a value that names no
                branch, or a gate returned a row that decides nothing.
        """
        if self._host is None:
            read, self._read = self._read or host_copy(self.header), None
            self._host = read()
        if self._check is not None:
            check, self._check = self._check, None
            try:
                check(self)
            except ValueError:
                self._check = check
                raise
        return self._host

    def prefetch(self, check: Callable[[RoutingPlan], None] | None = None) -> RoutingPlan:
        """Starts the copy of the counts to the host, where they will be needed.

        `check` looks for faults: at once on the CPU, else when the counts are first read.
        """
        self._check = check
        if self.header.is_cpu:
            self.host_header  # noqa: B018 (it is checked now)
        elif self._host is None and self._read is None:
            self._read = host_copy(self.header)
        return self

    def verify(self) -> None:
        """Raises what is at fault, as `host_header` does."""
        self.host_header  # noqa: B018

    @property
    def is_read(self) -> bool:
        """Whether the host knows the counts already."""
        return self._host is not None

    @property
    def starts(self) -> tuple[int, ...]:
        """The B+1 offsets on the host."""
        return tuple(self.host_header[:FAULTS])

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
        count, first = self.host_header[FAULTS:]
        return count, first

    def rows(self, branch: int) -> Tensor:
        """int64 [n_b]: the samples of `branch`, ascending."""
        entries = self.order[self.starts[branch] : self.starts[branch + 1]].long()
        return entries if self.ranks == 1 else entries // self.ranks


def host_copy(header: Tensor) -> Callable[[], list[int]]:
    """Starts to copy `header` to the host; what is returned waits for it and gives the values.

    On a GPU the copy goes to pinned memory behind the kernels that were launched so far, and only
    the wait for it is a synchronisation: what runs in between runs meanwhile.
    """
    if not header.is_cuda or torch.compiler.is_compiling():
        return header.tolist
    if torch.cuda.is_current_stream_capturing():
        return header.tolist  # a captured plan is replayed; its counts are not read
    host = torch.empty(header.shape, dtype=header.dtype, pin_memory=True)
    host.copy_(header, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(header.device))

    def wait() -> list[int]:
        arrived.synchronize()
        return host.tolist()

    return wait
