"""route: a stable counting sort of the entries by branch, in three launches without atomics.

Count the branches of each tile of entries, sum the counts over the tiles, then let each tile write
its entries; the rank of an entry within its tile comes from comparing it with those before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .configs import (
    ARGMAX,
    ROUTE_BRANCHES,
    ROUTE_ENTRIES,
    ROUTE_SCAN,
    ROUTE_WARPS,
    tile_for,
)
from .launch import launch

FAULTY = tl.constexpr(-2)
NEVER = tl.constexpr(2**31 - 1)  # greater than every entry


@triton.jit
def branch_of(selection, entry, entries, num_branches):
    """The branch of each entry, -1 for none, FAULTY where there is no such branch."""
    value = tl.load(selection + entry, mask=entry < entries, other=0)
    if selection.dtype.element_ty == tl.int1:
        branch = tl.where(value, entry % num_branches, -1)
    else:
        value = value.to(tl.int64)
        branch = tl.where((value >= -1) & (value < num_branches), value, FAULTY).to(tl.int32)
    return tl.where(entry < entries, branch, -1)


@triton.jit(do_not_specialize=["entries", "tiles"])
def count_tile(
    selection,
    counts,
    faults,
    entries,
    tiles,
    num_branches,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """counts[b, tile]: entries of branch b. faults[:, tile]: how many, and the first."""
    tile = tl.program_id(0)
    entry = tile * TILE + tl.arange(0, TILE)
    branch = branch_of(selection, entry, entries, num_branches)
    first = 0
    while first < num_branches:
        column = first + tl.arange(0, COLUMNS)
        count = tl.sum((branch[:, None] == column[None, :]).to(tl.int32), 0)
        at = counts + column.to(tl.int64) * (tiles + 1) + tile
        tl.store(at, count, mask=column < num_branches)
        first += COLUMNS
    faulty = branch == FAULTY
    tl.store(faults + tile, tl.sum(faulty.to(tl.int32), 0))
    tl.store(faults + tiles + tile, tl.min(tl.where(faulty, entry, NEVER), 0))


@triton.jit(do_not_specialize=["tiles"])
def scan_tiles(counts, faults, header, tiles, num_branches, SCAN: tl.constexpr):
    """Program b makes counts[b, t] the sum before t, so that counts[b, tiles] is that of all.

    The last program sums up the faults.
    """
    branch = tl.program_id(0)
    if branch < num_branches:
        row = counts + branch.to(tl.int64) * (tiles + 1)
        before = tl.full((), 0, tl.int32)
        first = 0
        while first < tiles + 1:
            tile = first + tl.arange(0, SCAN)
            count = tl.load(row + tile, mask=tile < tiles, other=0)
            tl.store(row + tile, before + tl.cumsum(count, 0) - count, mask=tile <= tiles)
            before += tl.sum(count, 0)
            first += SCAN
    else:
        total = tl.full((), 0, tl.int32)
        earliest = tl.full((), NEVER, tl.int32)
        first = 0
        while first < tiles:
            tile = first + tl.arange(0, SCAN)
            total += tl.sum(tl.load(faults + tile, mask=tile < tiles, other=0), 0)
            entry = tl.load(faults + tiles + tile, mask=tile < tiles, other=NEVER)
            earliest = tl.minimum(earliest, tl.min(entry, 0))
            first += SCAN
        tl.store(header + num_branches + 1, total)
        tl.store(header + num_branches + 2, tl.where(total > 0, earliest, -1))


@triton.jit(do_not_specialize=["entries", "tiles"])
def write_tile(
    selection,
    counts,
    order,
    inverse,
    header,
    entries,
    tiles,
    num_branches,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each entry's slot: those of lower branches, of earlier tiles, of earlier entries here."""
    tile = tl.program_id(0)
    here = tl.arange(0, TILE)
    entry = tile * TILE + here
    branch = branch_of(selection, entry, entries, num_branches)
    taken = branch >= 0
    slot = tl.load(counts + branch.to(tl.int64) * (tiles + 1) + tile, mask=taken, other=0)
    earlier = (branch[:, None] == branch[None, :]) & (here[None, :] < here[:, None])
    slot += tl.sum(earlier.to(tl.int32), 1)
    total = tl.full((), 0, tl.int32)
    first = 0
    while first < num_branches:
        column = first + tl.arange(0, COLUMNS)
        known = column < num_branches
        size = tl.load(counts + column.to(tl.int64) * (tiles + 1) + tiles, mask=known, other=0)
        slot += tl.sum(tl.where(column[None, :] < branch[:, None], size[None, :], 0), 1)
        offset = total + tl.cumsum(size, 0) - size
        if tile == 0:
            tl.store(header + column, offset, mask=known)
        total += tl.sum(size, 0)
        first += COLUMNS
    if tile == 0:
        tl.store(header + num_branches, total)
    tl.store(order + slot, entry, mask=taken)
    tl.store(order + entry, -1, mask=(entry >= total) & (entry < entries))
    tl.store(inverse + entry, tl.where(taken, slot, -1), mask=entry < entries)


@triton.jit(do_not_specialize=["num_rows"])
def argmax_tile(
    logits, choice, marker, num_rows, num_branches, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """choice[n]: the first of the largest, -1 where softmax is undefined; marker: FAULTY there."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    row = logits + n.to(tl.int64) * num_branches
    top = tl.full([ROWS], float("-inf"), wide)
    best = tl.zeros([ROWS], tl.int32)
    undefined = tl.zeros([ROWS], tl.int32)
    first = 0
    while first < num_branches:
        column = first + tl.arange(0, COLUMNS)
        inside = (n < num_rows)[:, None] & (column < num_branches)[None, :]
        value = tl.load(row[:, None] + column[None, :], mask=inside, other=float("-inf")).to(wide)
        nan = value != value
        undefined += tl.sum(nan.to(tl.int32), 1)
        value = tl.where(nan, float("-inf"), value)
        largest = tl.max(value, 1)
        place = tl.min(tl.where(value == largest[:, None], column[None, :], NEVER), 1)
        best = tl.where(largest > top, place, best)
        top = tl.maximum(top, largest)
        first += COLUMNS
    defined = (undefined == 0) & (tl.abs(top) < float("inf"))
    tl.store(choice + n, tl.where(defined, best, -1).to(tl.int64), mask=n < num_rows)
    tl.store(marker + n, tl.where(defined, best, FAULTY), mask=n < num_rows)


def route(selection: Tensor, num_branches: int) -> tuple[Tensor, Tensor, Tensor]:
    checks.route(selection, num_branches)
    selection = selection.contiguous()
    num_rows, ranks = selection.shape if selection.ndim == 2 else (selection.shape[0], 1)
    entries = num_rows * ranks
    tiles = max(1, triton.cdiv(entries, ROUTE_ENTRIES))
    order = selection.new_empty(entries, dtype=torch.int32)
    inverse = selection.new_empty((num_rows, ranks), dtype=torch.int32)
    header = selection.new_empty(num_branches + 3, dtype=torch.int32)
    counts = selection.new_empty((num_branches, tiles + 1), dtype=torch.int32)
    faults = selection.new_empty((2, tiles), dtype=torch.int32)
    sizes = (entries, tiles, num_branches)
    shape = {"TILE": ROUTE_ENTRIES, "COLUMNS": ROUTE_BRANCHES, "num_warps": ROUTE_WARPS}
    launch(count_tile, tiles, header, selection, counts, faults, *sizes, **shape)
    scan = {"SCAN": ROUTE_SCAN, "num_warps": ROUTE_WARPS}
    launch(
        scan_tiles, num_branches + 1, header, counts, faults, header, tiles, num_branches, **scan
    )
    launch(write_tile, tiles, header, selection, counts, order, inverse, header, *sizes, **shape)
    return order, inverse, header


def route_argmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.route_argmax(logits)
    logits = logits.contiguous()
    num_rows, num_branches = logits.shape
    choice = logits.new_empty(num_rows, dtype=torch.int64)
    marker = logits.new_empty(num_rows, dtype=torch.int32)
    size = tile_for(ARGMAX, num_branches)
    launch(
        argmax_tile,
        triton.cdiv(num_rows, size.rows),
        logits,
        logits,
        choice,
        marker,
        num_rows,
        num_branches,
        ROWS=size.rows,
        COLUMNS=size.units,
        num_warps=size.num_warps,
    )
    return choice, *route(marker, num_branches)
