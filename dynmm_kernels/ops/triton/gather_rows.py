"""gather_rows: out_i[s] = sources[i][e // ranks] (times weights.flat[e]), e = order[starts[i] + s].

One launch per source and range. What is not weighted moves as bytes. An e that names no row, or no
weight, reads as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import checks, reference
from .configs import MOVE, SUM, tile_for
from .launch import launch
from .rows import NUMBERS, laid_out_as, stride_in, tile, units_in, widest_unit


@triton.jit(do_not_specialize=["first", "count", "rows", "entries"])
def gather_tile(
    source,
    out,
    order,
    weights,
    first,
    count,
    ranks,
    rows,
    entries,
    stride,
    units,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    slot, unit = tile(units, ROWS, UNITS)
    entry = tl.load(order + first + slot, mask=slot < count, other=-1)
    held = (entry >= 0) & (entry // ranks < rows) & (entry < entries)
    inside = (unit < units)[None, :]
    row = source + (entry // ranks).to(tl.int64) * stride
    value = tl.load(row[:, None] + unit[None, :], mask=held[:, None] & inside, other=0)
    if weights is not None:
        weight = tl.load(weights + entry, mask=held, other=0)[:, None]
        value = (value.to(weight.dtype) * weight).to(out.dtype.element_ty)
    to = out + (slot * units)[:, None] + unit[None, :]
    tl.store(to, value, mask=(slot < count)[:, None] & inside)


def gather_rows(
    sources: list[Tensor],
    starts: list[int],
    stops: list[int],
    order: Tensor,
    ranks: int,
    weights: Tensor | None = None,
) -> list[Tensor]:
    checks.gather_rows(sources, starts, stops, order, ranks, weights)
    order = order.contiguous()
    weights = None if weights is None else weights.contiguous()
    gathered = []
    for source, start, stop in zip(sources, starts, stops, strict=True):
        out = reference.empty_rows(source, stop - start)
        gathered.append(out)
        if out.numel() == 0:
            continue
        source = laid_out_as(source, out)
        weighted = weights is not None
        unit = NUMBERS[source.dtype] if weighted else widest_unit(source, out)
        units = units_in(unit, source)
        size = tile_for(SUM if weighted else MOVE, units)
        launch(
            gather_tile,
            triton.cdiv(stop - start, size.rows) * triton.cdiv(units, size.units),
            order,
            triton.reinterpret(source, unit),
            triton.reinterpret(out, unit),
            order,
            weights,
            start,
            stop - start,
            ranks,
            source.shape[0],
            2**31 if weights is None else weights.numel(),
            stride_in(unit, source),
            units,
            ROWS=size.rows,
            UNITS=size.units,
            num_warps=size.num_warps,
        )
    return gathered
