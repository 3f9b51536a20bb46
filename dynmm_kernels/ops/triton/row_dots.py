"""row_dots: dots[n, j] = <rows[n], row(inverse[n, j])>, zero where there is no row.

A program keeps partial sums as wide as its tile and adds them at the end, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import checks, reference
from .configs import DOT, tile_for
from .launch import launch
from .rows import (
    NUMBERS,
    alignment,
    laid_out_as,
    locate,
    rows_by_slot,
    stride_in,
    sum_type,
    table,
    units_in,
)


@triton.jit(do_not_specialize=["num_rows"])
def dot_tile(
    outputs,
    starts,
    stops,
    strides,
    inverse,
    rows,
    dots,
    num_rows,
    ranks,
    stride,
    units,
    SUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mine = rows + n * stride
    j = 0
    while j < ranks:
        slot = tl.load(inverse + n * ranks + j, mask=n < num_rows, other=-1)
        other, held = locate(slot, outputs, starts, stops, strides, ALIGNED)
        partial = tl.zeros([ROWS, UNITS], SUM)
        first = 0
        while first < units:
            unit = first + tl.arange(0, UNITS)
            inside = held[:, None] & (unit < units)[None, :]
            a = tl.load(mine[:, None] + unit[None, :], mask=inside, other=0)
            b = tl.load(other[:, None] + unit[None, :], mask=inside, other=0)
            partial += a.to(SUM) * b.to(SUM)
            first += UNITS
        dot = tl.sum(partial, 1).to(dots.dtype.element_ty)
        tl.store(dots + n * ranks + j, dot, mask=n < num_rows)
        j += 1


def row_dots(rows: Tensor, outputs: list[Tensor], starts: list[int], inverse: Tensor) -> Tensor:
    checks.row_dots(rows, outputs, starts, inverse)
    num_rows, ranks = inverse.shape
    dots = rows.new_empty(inverse.shape, dtype=checks.weight_dtype(rows.dtype))
    if rows.numel() == 0:
        return dots.zero_()
    rows = laid_out_as(rows, reference.empty_rows(rows, 0))
    others, starts, inverse = rows_by_slot(outputs, starts, inverse, rows)
    unit = NUMBERS[rows.dtype]
    units = units_in(unit, rows)
    size = tile_for(DOT, units)
    launch(
        dot_tile,
        triton.cdiv(num_rows, size.rows),
        rows,
        *table(others, starts, unit, rows),
        inverse,
        triton.reinterpret(rows, unit),
        dots,
        num_rows,
        ranks,
        stride_in(unit, rows),
        units,
        SUM=sum_type(rows.dtype),
        ALIGNED=alignment(others),
        ROWS=size.rows,
        UNITS=size.units,
        num_warps=size.num_warps,
    )
    return dots
