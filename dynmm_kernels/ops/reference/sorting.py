"""route, route_argmax: the samples sorted by branch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..schemas import FAULTS, op


def _plan_like(
    like: Tensor, num_rows: int, ranks: int, num_branches: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty(num_rows * ranks, dtype=torch.int32),
        like.new_empty((num_rows, ranks), dtype=torch.int32),
        like.new_empty(num_branches + 3, dtype=torch.int32),
    )


def _route_like(selection: Tensor, num_branches: int) -> tuple[Tensor, Tensor, Tensor]:
    checks.route(selection, num_branches)
    num_rows, ranks = selection.shape if selection.ndim == 2 else (selection.shape[0], 1)
    return _plan_like(selection, num_rows, ranks, num_branches)


@op("route(Tensor selection, int num_branches) -> (Tensor, Tensor, Tensor)", fake=_route_like)
def route(selection: Tensor, num_branches: int) -> tuple[Tensor, Tensor, Tensor]:
    """selection: int [N] or [N, k] in -1..B-1, or bool [N, B] -> order, inverse, header."""
    checks.route(selection, num_branches)
    if selection.ndim == 1:
        selection = selection.unsqueeze(1)
    if selection.dtype == torch.bool:
        columns = torch.arange(num_branches, device=selection.device)
        selection = torch.where(selection, columns, -1)
    branch = selection.long().flatten()
    faulty = (branch < -1) | (branch >= num_branches)
    key = torch.where(faulty | (branch < 0), num_branches, branch)  # no branch sorts last
    entry = torch.argsort(key, stable=True)
    counts = torch.zeros(num_branches + 1, dtype=torch.long, device=key.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    offsets = torch.cat([counts.new_zeros(1), counts[:num_branches].cumsum(0)])
    slot = torch.arange(branch.numel(), device=key.device)
    taken = slot < offsets[-1]
    order = torch.where(taken, entry, -1)
    inverse = torch.empty_like(order).scatter_(0, entry, torch.where(taken, slot, -1))
    return (
        order.int(),
        inverse.int().view(selection.shape),
        torch.cat([offsets, _faults(faulty)]).int(),
    )


def _argmax_like(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.route_argmax(logits)
    num_rows, num_branches = logits.shape
    choice = logits.new_empty(num_rows, dtype=torch.int64)
    return choice, *_plan_like(logits, num_rows, 1, num_branches)


@op("route_argmax(Tensor logits) -> (Tensor, Tensor, Tensor, Tensor)", fake=_argmax_like)
def route_argmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits: floating [N, B] -> choice int64 [N], order, inverse, header; ties go to the first.

    A row without a finite maximum (nan, inf, all -inf: softmax is undefined there) is faulty.
    """
    checks.route_argmax(logits)
    faulty = ~logits.amax(dim=1).isfinite()
    choice = logits.argmax(dim=1).masked_fill(faulty, -1)
    order, inverse, header = route(choice, logits.shape[1])
    header[FAULTS:] = _faults(faulty)
    return choice, order, inverse, header


def _faults(faulty: Tensor) -> Tensor:
    """How many are True, and the index of the first, or -1: the end of a header."""
    index = torch.arange(faulty.numel(), device=faulty.device)
    first = torch.cat([index.masked_fill(~faulty, faulty.numel()), index.new_tensor([2**31])]).min()
    return torch.stack([faulty.sum(), torch.where(faulty.any(), first, -1)])
