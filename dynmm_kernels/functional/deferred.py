"""Plans where there are no values to sort by: in a traced graph, on tensors without data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_dynamo_compiling

from .. import ops
from ..ops.schemas import FAULTS
from .plan import RoutingPlan


def has_values(tensor: Tensor) -> bool:
    """Whether Python may look at them; not while a compiler or an exporter traces."""
    if type(tensor) is Tensor:  # what exporters pass are subclasses
        return not (is_dynamo_compiling() or tensor.is_meta)
    return not (torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor))


class DeferredPlan(RoutingPlan):
    """A plan that is sorted when somebody asks, which masked execution does not.

    In a graph that is traced the counts are symbols. They stand for themselves, not for differences
    of offsets, so that sizes are easy to compare; and faults stop the graph where it runs.
    """

    __slots__ = ("_selection", "_sorted")
    traced = True

    def __init__(self, selection: Tensor, num_branches: int) -> None:
        self.num_branches = num_branches
        self.num_rows, self.ranks = (
            selection.shape if selection.ndim == 2 else (*selection.shape, 1)
        )
        self._selection = selection
        self._sorted: tuple[Tensor, Tensor, Tensor] | None = None
        self._host = self._check = self._read = self._counts = None

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._sorted is None:
            self._sorted = ops.kernels().route(self._selection, self.num_branches)
        return self._sorted

    @property
    def order(self) -> Tensor:  # type: ignore[override]
        return self._parts()[0]

    @property
    def inverse(self) -> Tensor:  # type: ignore[override]
        return self._parts()[1]

    @property
    def header(self) -> Tensor:  # type: ignore[override]
        return self._parts()[2]

    @property
    def host_header(self) -> list[int]:
        if self._host is None:
            self._host = read_headers([self.header])[0]
        return self._host

    def prefetch(self, check: object = None) -> RoutingPlan:
        return self

    def verify(self) -> None:
        """What is at fault cannot be known."""


def read_headers(headers: Sequence[Tensor], least: int = 0) -> list[list[int]]:
    """All of them on the host; counts are symbols where a graph is traced, `least` at least."""
    numbers = torch.cat([torch.cat([h[:FAULTS].diff(), h[FAULTS:]]) for h in headers])
    host = numbers.cpu().tolist()
    size = headers[0].shape[0] - 1
    read = []
    for i in range(len(headers)):
        *counts, faults, first = host[i * size : (i + 1) * size]
        for count in counts:
            torch._check(count >= least)
        torch._check(faults == 0)
        read.append([0, *itertools.accumulate(counts), faults, first])
    return read
