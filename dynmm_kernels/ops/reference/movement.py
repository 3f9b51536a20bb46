"""gather_rows, combine_rows, row_dots: rows to their branches, back, and the weights' gradient."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import checks
from ..checks import weight_dtype
from ..schemas import op
from .layouts import empty_rows, sum_dtype

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _gathered_like(
    sources: list[Tensor],
    starts: list[int],
    stops: list[int],
    order: Tensor,
    ranks: int,
    weights: Tensor | None = None,
) -> list[Tensor]:
    checks.gather_rows(sources, starts, stops, order, ranks, weights)
    return [
        empty_rows(source, stop - start)
        for source, start, stop in zip(sources, starts, stops, strict=True)
    ]


@op(
    "gather_rows(Tensor[] sources, int[] starts, int[] stops, Tensor order, int ranks,"
    " Tensor? weights=None) -> Tensor[]",
    fake=_gathered_like,
)
def gather_rows(
    sources: list[Tensor],
    starts: list[int],
    stops: list[int],
    order: Tensor,
    ranks: int,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """out_i[s] = sources[i][e // ranks] (times weights.flat[e]), with e = order[starts[i] + s].

    An e that names no row, or no weight, reads as zeros.
    """
    checks.gather_rows(sources, starts, stops, order, ranks, weights)
    gathered = []
    for source, start, stop in zip(sources, starts, stops, strict=True):
        entry = order[start:stop].long()
        held = (entry >= 0) & (entry // ranks < source.shape[0])
        if weights is not None:
            held &= entry < weights.numel()
        entry = torch.where(held, entry, 0)
        rows = _rows(source, entry // ranks)
        if weights is not None:
            rows = _scaled(rows, weights.flatten()[entry])
        rows = torch.where(_as_column(held, rows), _bits(rows), 0).view(source.dtype)
        gathered.append(empty_rows(source, stop - start).copy_(rows))
    return gathered


def _combined_like(
    outputs: list[Tensor], starts: list[int], inverse: Tensor, weights: Tensor | None = None
) -> Tensor:
    checks.combine_rows(outputs, starts, inverse, weights)
    return empty_rows(outputs[0], inverse.shape[0])


@op(
    "combine_rows(Tensor[] outputs, int[] starts, Tensor inverse, Tensor? weights=None) -> Tensor",
    fake=_combined_like,
    sums=True,
)
def combine_rows(
    outputs: list[Tensor], starts: list[int], inverse: Tensor, weights: Tensor | None = None
) -> Tensor:
    """out[n] = sum_j weights[n, j] * row(inverse[n, j]), zero where no output holds the slot."""
    checks.combine_rows(outputs, starts, inverse, weights)
    pool, index = _pool(outputs, starts, inverse)
    first = outputs[0]
    out = empty_rows(first, inverse.shape[0])
    if inverse.shape[1] == 1 and weights is None:
        return out.copy_(_bits(pool).index_select(0, index[:, 0]).view(first.dtype))
    scale = None if weights is None else weights.reshape(inverse.shape)
    total = torch.zeros(out.shape, dtype=sum_dtype(first.dtype), device=out.device)
    for j in range(inverse.shape[1]):
        term = pool.index_select(0, index[:, j]).to(total.dtype)
        if scale is not None:
            term = term * _as_column(scale[:, j], term)
        total = total + torch.where(_as_column(index[:, j] > 0, term), term, 0)
    return out.copy_(total)


def _dots_like(rows: Tensor, outputs: list[Tensor], starts: list[int], inverse: Tensor) -> Tensor:
    checks.row_dots(rows, outputs, starts, inverse)
    return rows.new_empty(inverse.shape, dtype=weight_dtype(rows.dtype))


@op(
    "row_dots(Tensor rows, Tensor[] outputs, int[] starts, Tensor inverse) -> Tensor",
    fake=_dots_like,
    sums=True,
)
def row_dots(rows: Tensor, outputs: list[Tensor], starts: list[int], inverse: Tensor) -> Tensor:
    """dots[n, j] = <rows[n], row(inverse[n, j])> (real part), zero where there is no row."""
    checks.row_dots(rows, outputs, starts, inverse)
    pool, index = _pool(outputs, starts, inverse)
    wide = sum_dtype(rows.dtype)
    dots = torch.zeros(inverse.shape, dtype=weight_dtype(rows.dtype), device=rows.device)
    for j in range(inverse.shape[1]):
        other = pool.index_select(0, index[:, j]).to(wide).conj()
        product = (rows.to(wide) * other).unsqueeze(1).flatten(1).sum(1)
        real = product.real if product.is_complex() else product
        dots[:, j] = torch.where(index[:, j] > 0, real, 0)
    return dots


def _bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers, so that every dtype and every nan moves exactly."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype.itemsize not in _BITS:
        return tensor
    return tensor.view(_BITS[tensor.dtype.itemsize])


def _rows(source: Tensor, index: Tensor) -> Tensor:
    """The rows of `source` bit for bit; anything where it has none."""
    if source.shape[0] == 0:
        return source.new_zeros((index.shape[0], *source.shape[1:]))
    return _bits(source).index_select(0, index).view(source.dtype)


def _pool(outputs: list[Tensor], starts: list[int], inverse: Tensor) -> tuple[Tensor, Tensor]:
    """All rows below one zero row, and for each entry its row there; 0: no output holds it."""
    pool = torch.cat(
        [_bits(outputs[0]).new_zeros((1, *outputs[0].shape[1:])), *map(_bits, outputs)]
    )
    sizes = [output.shape[0] for output in outputs]
    first = list(itertools.accumulate(sizes[:-1], initial=1))
    begin, size, row = (
        torch.tensor(numbers, device=inverse.device) for numbers in (starts, sizes, first)
    )
    slot = inverse.long().contiguous()
    output = (torch.bucketize(slot, begin, right=True) - 1).clamp(min=0)
    local = slot - begin[output]
    held = (local >= 0) & (local < size[output])
    return pool.view(outputs[0].dtype), torch.where(held, row[output] + local, 0)


def _scaled(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows.to(sum_dtype(rows.dtype)) * _as_column(weights, rows)).to(rows.dtype)


def _as_column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.ndim - 1))
