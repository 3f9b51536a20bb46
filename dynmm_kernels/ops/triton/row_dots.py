"""row_dots: dots[n, j] = <rows[n], row(inverse[n, j])> (real part), zero where there is no row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .combine_rows import load_slot
from .configs import DOT_BLOCK, EXACT
from .layout import as_values, in_layout_of, joined, row_bytes, value_size


@triton.jit
def dot_entries(
    left,
    outputs,
    starts,
    stops,
    strides,
    inverse,
    dots,
    units,
    left_stride,
    ranks,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    """One entry (n, j): a fixed number of partial sums, added in a fixed order."""
    entry = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, 1)
    slot = tl.load(inverse + entry + row)
    total = tl.zeros((1, BLOCK), dtype=SUM)
    at = 0
    while at < units:
        c = at + tl.arange(0, BLOCK).to(tl.int64)
        inside = (row == 0)[:, None] & (c < units)[None, :]
        own = tl.load(left + entry // ranks * left_stride + c, mask=c < units, other=0)
        other, _ = load_slot(outputs, starts, stops, strides, slot, c, inside, SUM)
        total += own.to(SUM)[None, :] * other
        at += BLOCK
    tl.store(dots + entry + row, tl.sum(total, axis=1))


def row_dots(rows: Tensor, outputs: list[Tensor], starts: list[int], inverse: Tensor) -> Tensor:
    dots = torch.zeros(inverse.shape, dtype=reference.weight_dtype(rows.dtype), device=rows.device)
    if inverse.numel() == 0 or rows.numel() == 0:
        return dots
    rows = in_layout_of(rows, rows)
    blocks, firsts = joined([in_layout_of(output, rows) for output in outputs], starts)
    width = value_size(rows)
    dot_entries[(inverse.numel(),)](
        as_values(rows),
        tuple(as_values(block) for block in blocks),
        tuple(firsts),
        tuple(start + block.shape[0] for start, block in zip(firsts, blocks, strict=True)),
        tuple(block.stride(0) * block.element_size() // width for block in blocks),
        inverse.contiguous(),
        dots,
        row_bytes(rows) // width,
        rows.stride(0) * rows.element_size() // width,
        inverse.shape[1],
        BLOCK=DOT_BLOCK,
        SUM=tl.float64 if dots.dtype == torch.float64 else tl.float32,
        num_warps=4,
        **EXACT,
    )
    return dots
