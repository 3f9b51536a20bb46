"""What results look like: the layouts that every backend gives them, the dtype sums are taken in.

The dtype of weights and of row dots is in `checks`, which compares with it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def empty_rows(source: Tensor, num_rows: int) -> Tensor:
    """[num_rows, ...] uninitialised, in the memory format of `source`'s rows.

    Rows whose elements fill one block (contiguous, channels_last, transposed) keep their inner
    strides, so that a row can be moved as bytes; other rows become contiguous.
    """
    shape, strides = source.shape[1:], source.stride()[1:]
    numel, filled = 1, 1
    for size in shape:
        numel *= size
    if numel == 0:
        return source.new_empty((num_rows, *shape))
    inner = sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1)
    for stride, size in inner:
        if stride != filled:
            return source.new_empty((num_rows, *shape))
        filled *= size
    return source.new_empty_strided((num_rows, *shape), (numel, *strides))


def empty_maps(like: Tensor, num_rows: int) -> Tensor:
    """[num_rows, C, ...] uninitialised: channels last where the samples of `like` are.

    Maps in any other layout become contiguous.
    """
    shape, strides = like.shape, like.stride()
    inner = [*range(like.ndim - 1, 1, -1)]
    orders = [[*inner, 1], [1, *inner]] if like.ndim in (4, 5) else [[*inner, 1]]
    layouts = [_packed(shape, order) for order in orders]
    for layout in layouts:
        if all(shape[d] <= 1 or strides[d] == layout[d] for d in range(1, like.ndim)):
            return like.new_empty_strided((num_rows, *shape[1:]), layout)
    return like.new_empty_strided((num_rows, *shape[1:]), layouts[0])


def _packed(shape: torch.Size, order: list[int]) -> list[int]:
    """Strides of dense maps, dim 0 outermost; `order`: the other dimensions, innermost first."""
    strides, step = [1] * len(shape), 1
    for d in order:
        strides[d] = step
        step = step * max(1, shape[d])
    strides[0] = step
    return strides
