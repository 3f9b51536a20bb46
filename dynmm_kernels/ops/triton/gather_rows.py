"""gather_rows: out_i[s] = sources[i][order[starts[i] + s] // ranks]; one launch per range."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .configs import EXACT, tile_for
from .layout import (
    accumulator,
    as_bytes,
    as_values,
    byte_width,
    in_layout_of,
    row_bytes,
    value_size,
)


@triton.jit
def gather_units(
    source,
    out,
    entries,
    weights,
    rows,
    units,
    stride,
    ranks,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    SCALED: tl.constexpr,
    SUM: tl.constexpr,
):
    """A tile of one range; `stride` and `units` count units of the source's type."""
    column_tiles = tl.cdiv(units, UNITS)
    tile = tl.program_id(0)
    r = (tile // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = (tile % column_tiles).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    entry = tl.load(entries + r, mask=r < rows, other=0)
    inside = (r < rows)[:, None] & (c < units)[None, :]
    row = (entry // ranks).to(tl.int64)
    value = tl.load(source + row[:, None] * stride + c[None, :], mask=inside)
    if SCALED:
        weight = tl.load(weights + entry, mask=r < rows, other=0)
        value = (value.to(SUM) * weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + r[:, None] * units + c[None, :], value, mask=inside)


def gather_rows(
    sources: list[Tensor],
    starts: list[int],
    stops: list[int],
    order: Tensor,
    ranks: int,
    weights: Tensor | None = None,
) -> list[Tensor]:
    order = order.contiguous()
    gathered = []
    for source, start, stop in zip(sources, starts, stops, strict=True):
        source = in_layout_of(source, source)
        out = reference.empty_rows(source, stop - start)
        gathered.append(out)
        if out.numel() == 0:
            continue
        if weights is None:
            width = byte_width([source, out])
            pointers = as_bytes(source, width), as_bytes(out, width)
        else:
            width = value_size(source)
            pointers = as_values(source), as_values(out)
        units, stride = row_bytes(out) // width, source.stride(0) * source.element_size() // width
        tile = tile_for(units)
        grid = (triton.cdiv(stop - start, tile.rows) * triton.cdiv(units, tile.units),)
        gather_units[grid](
            *pointers,
            order[start:stop],
            order if weights is None else weights.contiguous(),
            stop - start,
            units,
            stride,
            ranks,
            ROWS=tile.rows,
            UNITS=tile.units,
            SCALED=weights is not None,
            SUM=accumulator(source.dtype),
            num_warps=tile.warps,
            **EXACT,
        )
    return gathered
