"""Rows as kernels see them: a base pointer, a row stride, and units of one type.

A row whose elements fill one block moves as that block (see `reference.empty_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .configs import MOST_OUTPUTS

_BYTES = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
_VALUES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.complex128: tl.float64,
    torch.complex64: tl.float32,
    torch.int64: tl.int64,
    torch.int32: tl.int32,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def in_layout_of(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the rows of `reference.empty_rows(like, ...)`: itself, or a copy."""
    tensor = tensor.resolve_conj().resolve_neg()
    wanted = reference.empty_rows(like, 1).stride()[1:]
    sizes, strides = tensor.shape[1:], tensor.stride()[1:]
    if all(n <= 1 or a == b for n, a, b in zip(sizes, strides, wanted, strict=True)):
        return tensor
    return reference.empty_rows(like, tensor.shape[0]).copy_(tensor)


def row_bytes(tensor: Tensor) -> int:
    return tensor[:1].numel() * tensor.element_size() if tensor.shape[0] else _empty_bytes(tensor)


def _empty_bytes(tensor: Tensor) -> int:
    return tensor.new_empty((1, *tensor.shape[1:])).numel() * tensor.element_size()


def byte_width(tensors: Sequence[Tensor]) -> int:
    """The widest of 8, 4, 2, 1 bytes to which rows, strides and addresses of all are aligned."""
    bits = 8
    for tensor in tensors:
        bits |= tensor.data_ptr() | row_bytes(tensor) | tensor.stride(0) * tensor.element_size()
    return bits & -bits


def as_bytes(tensor: Tensor, width: int) -> Any:
    """A pointer argument to units of `width` bytes."""
    return triton.reinterpret(tensor, _BYTES[width])


def as_values(tensor: Tensor) -> Any:
    """A pointer argument to numbers; complex numbers are pairs of real ones."""
    if tensor.dtype not in _VALUES:
        raise TypeError(f"the Triton kernels have no arithmetic for {tensor.dtype}")
    return triton.reinterpret(tensor, _VALUES[tensor.dtype])


def value_size(tensor: Tensor) -> int:
    """Bytes of one number of `as_values`."""
    return tensor.element_size() // (2 if tensor.is_complex() else 1)


def accumulator(dtype: torch.dtype) -> Any:
    """fp32 for fp16, bf16 and fp32; fp64 for fp64; int64, which wraps, for integers."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return tl.int64
    return tl.float64 if dtype in (torch.float64, torch.complex128) else tl.float32


def joined(outputs: Sequence[Tensor], starts: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """Outputs in one layout and their first slots, at most MOST_OUTPUTS of them.

    Where there are more, runs of neighbours become one tensor.
    """
    first = outputs[0]
    rows = [in_layout_of(output, first) for output in outputs]
    firsts = list(starts)
    while len(rows) > MOST_OUTPUTS:
        pairs = []
        for i in range(0, len(rows), 2):
            if i + 1 == len(rows):
                pairs.append((rows[i], firsts[i]))
                continue
            gap = firsts[i + 1] - firsts[i] - rows[i].shape[0]
            out = reference.empty_rows(first, firsts[i + 1] - firsts[i] + rows[i + 1].shape[0])
            out[: rows[i].shape[0]] = rows[i]
            if gap:  # slots that no output holds count as zero rows
                out[rows[i].shape[0] : rows[i].shape[0] + gap] = 0
            out[rows[i].shape[0] + gap :] = rows[i + 1]
            pairs.append((out, firsts[i]))
        rows, firsts = [row for row, _ in pairs], [start for _, start in pairs]
    return rows, firsts
