"""combine_rows: out[n] = sum_j weights[n, j] * row(inverse[n, j]), zero where there is no row.

Programs go over the rows of the result and read every output where it lies, so that each element
is written once and ranks are summed in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import checks, reference
from .configs import MOVE, SUM, tile_for
from .launch import launch
from .rows import (
    NUMBERS,
    alignment,
    locate,
    rows_by_slot,
    sum_type,
    table,
    tile,
    units_in,
    widest_unit,
)


@triton.jit(do_not_specialize=["num_rows"])
def move_tile(
    outputs,
    starts,
    stops,
    strides,
    inverse,
    out,
    num_rows,
    units,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    n, unit = tile(units, ROWS, UNITS)
    slot = tl.load(inverse + n, mask=n < num_rows, other=-1)
    row, held = locate(slot, outputs, starts, stops, strides, ALIGNED)
    inside = (unit < units)[None, :]
    value = tl.load(row[:, None] + unit[None, :], mask=held[:, None] & inside, other=0)
    at = out + (n * units)[:, None] + unit[None, :]
    tl.store(at, value, mask=(n < num_rows)[:, None] & inside)


@triton.jit(do_not_specialize=["num_rows"])
def sum_tile(
    outputs,
    starts,
    stops,
    strides,
    inverse,
    weights,
    out,
    num_rows,
    ranks,
    units,
    SUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    n, unit = tile(units, ROWS, UNITS)
    inside = (unit < units)[None, :]
    total = tl.zeros([ROWS, UNITS], SUM)
    j = 0
    while j < ranks:
        slot = tl.load(inverse + n * ranks + j, mask=n < num_rows, other=-1)
        row, held = locate(slot, outputs, starts, stops, strides, ALIGNED)
        term = tl.load(row[:, None] + unit[None, :], mask=held[:, None] & inside, other=0).to(SUM)
        if weights is not None:
            term = term * tl.load(weights + n * ranks + j, mask=held, other=0)[:, None]
        total += term
        j += 1
    at = out + (n * units)[:, None] + unit[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(n < num_rows)[:, None] & inside)


def combine_rows(
    outputs: list[Tensor], starts: list[int], inverse: Tensor, weights: Tensor | None = None
) -> Tensor:
    checks.combine_rows(outputs, starts, inverse, weights)
    num_rows, ranks = inverse.shape
    out = reference.empty_rows(outputs[0], num_rows)
    if out.numel() == 0:
        return out
    rows, starts, inverse = rows_by_slot(outputs, starts, inverse, out)
    moves = ranks == 1 and weights is None
    unit = widest_unit(out, *rows) if moves else NUMBERS[out.dtype]
    units = units_in(unit, out)
    size = tile_for(MOVE if moves else SUM, units)
    programs = triton.cdiv(num_rows, size.rows) * triton.cdiv(units, size.units)
    shape = {
        "ALIGNED": alignment(rows),
        "ROWS": size.rows,
        "UNITS": size.units,
        "num_warps": size.num_warps,
    }
    lookup = table(rows, starts, unit, out)
    to = triton.reinterpret(out, unit)
    if moves:
        launch(move_tile, programs, out, *lookup, inverse, to, num_rows, units, **shape)
        return out
    scale = None if weights is None else weights.contiguous()
    wide = sum_type(out.dtype)
    launch(
        sum_tile,
        programs,
        out,
        *lookup,
        inverse,
        scale,
        to,
        num_rows,
        ranks,
        units,
        SUM=wide,
        **shape,
    )
    return out
