"""route: a stable counting sort in three launches, without atomics and without the host.

Tiles of entries are counted, the counts scanned over tiles, the entries placed. counts: [B, tiles].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import EXACT, LOGITS_PER_PROGRAM, ROUTE_TILE, SCAN_BLOCK

_NO_ENTRY = tl.constexpr(2**31 - 1)


@triton.jit
def branch_of(selection, e, entries, branches, MASK: tl.constexpr):
    """int32: 0..B-1, B for no branch (and past the end), B + 1 for a value that names none."""
    if MASK:
        taken = tl.load(selection + e, mask=e < entries, other=0) != 0
        return tl.where(taken, e % branches, branches)
    choice = tl.load(selection + e, mask=e < entries, other=-1).to(tl.int64)
    faulty = (choice < -1) | (choice >= branches)
    known = tl.where(choice == -1, branches, tl.where(faulty, branches + 1, choice))
    return known.to(tl.int32)


@triton.jit
def count_tiles(
    selection,
    counts,
    faults,
    entries,
    branches,
    tiles,
    MASK: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """counts[b, tile]; faults[0, tile]: how many, faults[1, tile]: the first."""
    tile = tl.program_id(0)
    e = tile * TILE + tl.arange(0, TILE)
    branch = branch_of(selection, e, entries, branches, MASK)
    b = tl.arange(0, BINS)
    tl.store(counts + b.to(tl.int64) * tiles + tile, tl.histogram(branch, BINS), mask=b < branches)
    faulty = branch == branches + 1
    tl.store(faults + tile, tl.sum(faulty.to(tl.int32)))
    tl.store(faults + tiles + tile, tl.min(tl.where(faulty, e, _NO_ENTRY)))


@triton.jit
def scan_tiles(counts, totals, faults, header, branches, tiles, BLOCK: tl.constexpr):
    """Program b < B: counts[b] becomes its exclusive sum over tiles. Program B: adds the faults."""
    b = tl.program_id(0)
    if b < branches:
        row = counts + b.to(tl.int64) * tiles
        before = 0
        at = 0
        while at < tiles:
            t = at + tl.arange(0, BLOCK)
            count = tl.load(row + t, mask=t < tiles, other=0)
            tl.store(row + t, before + tl.cumsum(count, 0) - count, mask=t < tiles)
            before += tl.sum(count)
            at += BLOCK
        tl.store(totals + b, before)
    else:
        number = 0
        first = _NO_ENTRY
        at = 0
        while at < tiles:
            t = at + tl.arange(0, BLOCK)
            number += tl.sum(tl.load(faults + t, mask=t < tiles, other=0))
            own = tl.load(faults + tiles + t, mask=t < tiles, other=_NO_ENTRY)
            first = tl.minimum(first, tl.min(own))
            at += BLOCK
        tl.store(header + branches + 1, number)
        tl.store(header + branches + 2, tl.where(number > 0, first, -1))


@triton.jit
def place_tiles(
    selection,
    counts,
    totals,
    order,
    inverse,
    header,
    entries,
    branches,
    tiles,
    MASK: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Every entry's slot: its branch's offset, plus earlier tiles, plus its rank in this tile."""
    tile = tl.program_id(0)
    b = tl.arange(0, BINS)
    total = tl.load(totals + b, mask=b < branches, other=0)
    offset = tl.cumsum(total, 0) - total
    end = tl.sum(total)
    if tile == 0:
        tl.store(header + b, offset, mask=b < branches)
        tl.store(header + branches, end)
    i = tl.arange(0, TILE)
    e = tile * TILE + i
    branch = branch_of(selection, e, entries, branches, MASK)
    taken = branch < branches
    earlier = (branch[None, :] == branch[:, None]) & (i[None, :] < i[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    before = tl.load(counts + branch.to(tl.int64) * tiles + tile, mask=taken, other=0)
    slot = tl.gather(offset, branch, 0) + before + rank
    tl.store(inverse + e, tl.where(taken, slot, -1), mask=e < entries)
    tl.store(order + slot, e, mask=taken)
    tl.store(order + e, -1, mask=(e < entries) & (e >= end))


@triton.jit
def choose_rows(
    logits,
    choice,
    marked,
    rows,
    branches,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """choice[n]: the first of the largest logits, or -1; marked[n]: the same, or -2."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, COLUMNS)
    inside = (n < rows)[:, None] & (b < branches)[None, :]
    value = tl.load(
        logits + n[:, None] * branches + b[None, :], mask=inside, other=float("-inf")
    ).to(WIDE)
    ordered = tl.sum((value != value).to(tl.int32), axis=1) == 0
    top = tl.max(tl.where(value == value, value, float("-inf")), axis=1)
    best = tl.min(tl.where(value == top[:, None], b[None, :], COLUMNS), axis=1)
    fine = ordered & (top < float("inf")) & (top > float("-inf"))
    tl.store(choice + n, tl.where(fine, best, -1).to(tl.int64), mask=n < rows)
    tl.store(marked + n, tl.where(fine, best, -2), mask=n < rows)


def route(selection: Tensor, num_branches: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, ranks = selection.shape if selection.ndim == 2 else (selection.shape[0], 1)
    selection = selection.contiguous()
    mask = selection.dtype == torch.bool
    if mask:
        selection = selection.view(torch.uint8)
    entries = rows * ranks
    order = selection.new_empty(entries, dtype=torch.int32)
    inverse = selection.new_empty((rows, ranks), dtype=torch.int32)
    header = selection.new_empty(num_branches + 3, dtype=torch.int32)
    tiles = max(triton.cdiv(entries, ROUTE_TILE), 1)
    counts = header.new_empty(num_branches * tiles)
    totals, faults = header.new_empty(num_branches), header.new_empty(2 * tiles)
    bins = max(triton.next_power_of_2(num_branches + 2), 32)
    shape = {"MASK": mask, "TILE": ROUTE_TILE, "BINS": bins, "num_warps": 4}
    count_tiles[(tiles,)](selection, counts, faults, entries, num_branches, tiles, **shape)
    scan_tiles[(num_branches + 1,)](
        counts, totals, faults, header, num_branches, tiles, BLOCK=SCAN_BLOCK, num_warps=4
    )
    place_tiles[(tiles,)](
        selection, counts, totals, order, inverse, header, entries, num_branches, tiles, **shape
    )
    return order, inverse, header


def route_argmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, branches = logits.shape
    choice = logits.new_empty(rows, dtype=torch.int64)
    marked = logits.new_empty(rows, dtype=torch.int32)
    columns = triton.next_power_of_2(branches)
    per_program = max(LOGITS_PER_PROGRAM // columns, 1)
    if rows:
        choose_rows[(triton.cdiv(rows, per_program),)](
            logits.contiguous(),
            choice,
            marked,
            rows,
            branches,
            ROWS=per_program,
            COLUMNS=columns,
            WIDE=tl.float64 if logits.dtype == torch.float64 else tl.float32,
            num_warps=4,
            **EXACT,
        )
    return choice, *route(marked, branches)
