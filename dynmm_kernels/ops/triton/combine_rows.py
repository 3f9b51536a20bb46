"""combine_rows: out[n] = sum_j weights[n, j] * row(inverse[n, j]), zero where there is no row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .configs import EXACT, tile_for
from .layout import accumulator, as_bytes, as_values, byte_width, joined, row_bytes, value_size


@triton.jit
def load_slot(outputs, starts, stops, strides, slot, c, inside, kind):
    """Row(slot)[c] and whether an output holds the slot; zeros where none does."""
    row = outputs[0] + slot.to(tl.int64) * 0
    found = slot < -1
    for i in tl.static_range(len(outputs)):
        own = (slot >= starts[i]) & (slot < stops[i])
        row = tl.where(own, outputs[i] + (slot - starts[i]).to(tl.int64) * strides[i], row)
        found = found | own
    value = tl.load(row[:, None] + c[None, :], mask=inside & found[:, None], other=0)
    return value.to(kind), found


@triton.jit
def combine_units(
    outputs,
    starts,
    stops,
    strides,
    inverse,
    weights,
    out,
    rows,
    units,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    MOVE: tl.constexpr,
    SCALED: tl.constexpr,
    SUM: tl.constexpr,
):
    """A tile of the output. MOVE: units are bytes of any type, one rank; else they are numbers."""
    column_tiles = tl.cdiv(units, UNITS)
    tile = tl.program_id(0)
    n = (tile // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = (tile % column_tiles).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    inside = (n < rows)[:, None] & (c < units)[None, :]
    if MOVE:
        slot = tl.load(inverse + n, mask=n < rows, other=-1)
        total, _ = load_slot(outputs, starts, stops, strides, slot, c, inside, out.dtype.element_ty)
    else:
        total = tl.zeros((ROWS, UNITS), dtype=SUM)
        for j in tl.static_range(RANKS):
            slot = tl.load(inverse + n * RANKS + j, mask=n < rows, other=-1)
            term, found = load_slot(outputs, starts, stops, strides, slot, c, inside, SUM)
            if SCALED:
                weight = tl.load(weights + n * RANKS + j, mask=n < rows, other=0)
                term = term * weight[:, None]
            total = tl.where(found[:, None], total + term, total)
    tl.store(out + n[:, None] * units + c[None, :], total.to(out.dtype.element_ty), mask=inside)


def combine_rows(
    outputs: list[Tensor], starts: list[int], inverse: Tensor, weights: Tensor | None = None
) -> Tensor:
    rows, ranks = inverse.shape
    out = reference.empty_rows(outputs[0], rows)
    if out.numel() == 0:
        return out
    blocks, firsts = joined(outputs, starts)
    move = ranks == 1 and weights is None
    width = byte_width([*blocks, out]) if move else value_size(out)
    units = row_bytes(out) // width
    tile = tile_for(units)
    pointer = (lambda block: as_bytes(block, width)) if move else as_values
    combine_units[(triton.cdiv(rows, tile.rows) * triton.cdiv(units, tile.units),)](
        tuple(pointer(block) for block in blocks),
        tuple(firsts),
        tuple(start + block.shape[0] for start, block in zip(firsts, blocks, strict=True)),
        tuple(block.stride(0) * block.element_size() // width for block in blocks),
        inverse.contiguous(),
        inverse if weights is None else weights.contiguous(),
        pointer(out),
        rows,
        units,
        RANKS=ranks,
        ROWS=tile.rows,
        UNITS=tile.units,
        MOVE=move,
        SCALED=weights is not None,
        SUM=accumulator(out.dtype),
        num_warps=tile.warps,
        **EXACT,
    )
    return out
