"""Rows as the kernels see them: dense blocks of units, and where the row of a slot lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks, reference
from .configs import MAX_OUTPUTS

UNITS = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
# Complex numbers go as pairs of real ones, which is exact for sums, for real weights and for the
# real part of an inner product.
NUMBERS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.complex64: tl.float32,
    torch.complex128: tl.float64,
    torch.int64: tl.int64,
    torch.int32: tl.int32,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """fp32 accumulates fp16, bf16 and fp32; fp64 itself; integers wrap."""
    if checks.weight_dtype(dtype) == torch.float64:
        return tl.float64
    return tl.float32 if dtype.is_floating_point or dtype.is_complex else tl.int64


def laid_out_as(rows: Tensor, like: Tensor) -> Tensor:
    """`rows` itself where its rows lie in memory as those of `like`, else a copy that does."""
    rows = rows.resolve_conj().resolve_neg()
    inner = zip(rows.shape[1:], rows.stride()[1:], like.stride()[1:], strict=True)
    if all(size == 1 or stride == wanted for size, stride, wanted in inner):
        return rows
    return reference.empty_rows(like, rows.shape[0]).copy_(rows)


def row_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.itemsize


def widest_unit(*tensors: Tensor) -> tl.dtype:
    """The widest of 8, 4, 2 and 1 bytes at whose multiples all rows begin and end."""
    bits = 8
    for tensor in tensors:
        bits |= tensor.data_ptr() | row_bytes(tensor) | tensor.stride(0) * tensor.itemsize
    return UNITS[bits & -bits]


def alignment(tensors: Sequence[Tensor]) -> int:
    """16 where all rows begin at multiples of 16 bytes, else 1."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr() | tensor.stride(0) * tensor.itemsize
    return 1 if bits % 16 else 16


def stride_in(unit: tl.dtype, tensor: Tensor) -> int:
    """The distance between two rows, in units."""
    return tensor.stride(0) * tensor.itemsize * 8 // unit.primitive_bitwidth


def units_in(unit: tl.dtype, tensor: Tensor) -> int:
    return row_bytes(tensor) * 8 // unit.primitive_bitwidth


def rows_by_slot(
    outputs: Sequence[Tensor], starts: Sequence[int], inverse: Tensor, like: Tensor
) -> tuple[list[Tensor], list[int], Tensor]:
    """Outputs that have rows, in the layout of `like`, their starts, and the slots to look up.

    Where they are more than one kernel reads, their rows are brought together and the slots are
    counted anew.
    """
    inverse = inverse.contiguous()
    held = [
        (laid_out_as(output, like), start)
        for output, start in zip(outputs, starts, strict=True)
        if output.shape[0]
    ]
    if len(held) <= MAX_OUTPUTS:
        return [output for output, _ in held], [start for _, start in held], inverse
    pool = laid_out_as(torch.cat([output for output, _ in held]), like)
    spans: list[list[int]] = []  # first slot, last slot + 1, row in the pool less the slot
    row = 0
    for output, start in held:
        if spans and spans[-1][1] == start and spans[-1][2] == row - start:
            spans[-1][1] += output.shape[0]
        else:
            spans.append([start, start + output.shape[0], row - start])
        row += output.shape[0]
    index = torch.full_like(inverse, -1)
    for start, stop, shift in spans:
        index = torch.where((inverse >= start) & (inverse < stop), inverse + shift, index)
    return [pool], [0], index


def table(
    outputs: Sequence[Tensor], starts: Sequence[int], unit: tl.dtype, like: Tensor
) -> tuple[tuple[Any, ...], ...]:
    """What `locate` looks slots up in: pointers, starts, stops and strides in units.

    Starts and stops change with every batch, and Triton compiles anew where a member of a tuple
    becomes 1 or a multiple of 16; as odd numbers above 1 they never do. The table is padded to a
    power of two with `like`, which holds no slot: few sizes, few kernels.
    """
    entries = [
        (
            triton.reinterpret(output, unit),
            2 * start + 3,
            2 * (start + output.shape[0]) + 3,
            stride_in(unit, output),
        )
        for output, start in zip(outputs, starts, strict=True)
    ]
    size = triton.next_power_of_2(max(1, len(entries)))
    entries += [(triton.reinterpret(like, unit), 3, 3, stride_in(unit, like))] * (
        size - len(entries)
    )
    return tuple(zip(*entries, strict=True))


@triton.jit
def tile(units, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """The rows and the units of this program; neighbours share their rows."""
    across = tl.cdiv(units, UNITS)
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit = (program % across) * UNITS + tl.arange(0, UNITS)
    return row, unit


@triton.jit
def locate(slot, outputs, starts, stops, strides, ALIGNED: tl.constexpr):
    """For each slot: a pointer to its row, and whether an output holds it."""
    slot = slot.to(tl.int64)
    row = outputs[0] + slot * 0
    held = slot != slot
    for i in tl.static_range(len(outputs)):
        start = (starts[i] >> 1) - 1
        here = (slot >= start) & (slot < (stops[i] >> 1) - 1)
        row = tl.where(here, outputs[i] + (slot - start) * strides[i], row)
        held = held | here
    # What Triton knows of the alignment of each pointer is lost where one of them is selected.
    return tl.multiple_of(row, ALIGNED), held
