"""The reference: what every op means, in eager PyTorch, on any device. Kernels must agree with it.

Movement is bit for bit; arithmetic accumulates fp16, bf16 and fp32 in fp32, fp64 in fp64, rank by
rank in ascending order. What an op cannot take is refused by `checks`.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from . import checks
from .checks import weight_dtype

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def route(selection: Tensor, num_branches: int) -> tuple[Tensor, Tensor, Tensor]:
    """selection: int [N] or [N, k] in -1..B-1, or bool [N, B] -> order, inverse, header."""
    checks.route(selection, num_branches)
    if selection.ndim == 1:
        selection = selection.unsqueeze(1)
    if selection.dtype == torch.bool:
        columns = torch.arange(num_branches, device=selection.device)
        selection = torch.where(selection, columns, -1)
    branch = selection.long().flatten()
    faulty = (branch < -1) | (branch >= num_branches)
    key = torch.where(faulty | (branch < 0), num_branches, branch)  # no branch sorts last
    entry = torch.argsort(key, stable=True)
    counts = torch.zeros(num_branches + 1, dtype=torch.long, device=key.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    offsets = torch.cat([counts.new_zeros(1), counts[:num_branches].cumsum(0)])
    slot = torch.arange(branch.numel(), device=key.device)
    taken = slot < offsets[-1]
    order = torch.where(taken, entry, -1)
    inverse = torch.empty_like(order).scatter_(0, entry, torch.where(taken, slot, -1))
    return (
        order.int(),
        inverse.int().view(selection.shape),
        torch.cat([offsets, faulty.sum().view(1), _first(faulty)]).int(),
    )


def route_argmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits: floating [N, B] -> choice int64 [N], order, inverse, header; ties go to the first.

    A row without a finite maximum (nan, inf, all -inf: softmax is undefined there) is faulty.
    """
    checks.route_argmax(logits)
    faulty = ~logits.amax(dim=1).isfinite()
    choice = logits.argmax(dim=1).masked_fill(faulty, -1)
    order, inverse, header = route(choice, logits.shape[1])
    header[-2:] = torch.cat([faulty.sum().view(1), _first(faulty)])
    return choice, order, inverse, header


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
    total = torch.zeros(out.shape, dtype=_sum_dtype(first.dtype), device=out.device)
    for j in range(inverse.shape[1]):
        term = pool.index_select(0, index[:, j]).to(total.dtype)
        if scale is not None:
            term = term * _as_column(scale[:, j], term)
        total = total + torch.where(_as_column(index[:, j] > 0, term), term, 0)
    return out.copy_(total)


def row_dots(rows: Tensor, outputs: list[Tensor], starts: list[int], inverse: Tensor) -> Tensor:
    """dots[n, j] = <rows[n], row(inverse[n, j])> (real part), zero where there is no row."""
    checks.row_dots(rows, outputs, starts, inverse)
    pool, index = _pool(outputs, starts, inverse)
    wide = _sum_dtype(rows.dtype)
    dots = torch.zeros(inverse.shape, dtype=weight_dtype(rows.dtype), device=rows.device)
    for j in range(inverse.shape[1]):
        other = pool.index_select(0, index[:, j]).to(wide).conj()
        product = (rows.to(wide) * other).unsqueeze(1).flatten(1).sum(1)
        real = product.real if product.is_complex() else product
        dots[:, j] = torch.where(index[:, j] > 0, real, 0)
    return dots


def se_add_means(maps: Tensor) -> Tensor:
    """maps [n, C, ...] -> [n, C], the mean of each channel of each sample."""
    checks.se_add_means(maps)
    wide = maps.to(_sum_dtype(maps.dtype))
    return _pixels(wide).mean(2).to(weight_dtype(maps.dtype))


def se_add(main: Tensor, aux: Tensor, main_scale: Tensor, aux_scale: Tensor) -> Tensor:
    """out[i] = main_scale[i] * main[i] + aux_scale[i] * aux[i] for i < n, main[i] behind.

    main [N, C, ...]; aux [n, C, ...], n <= N; scales [n, C].
    """
    checks.se_add(main, aux, main_scale, aux_scale)
    active, wide = aux.shape[0], _sum_dtype(main.dtype)
    out = empty_maps(main, main.shape[0])
    scaled = main[:active].to(wide) * _per_channel(main_scale, main)
    out[:active] = scaled + aux.to(wide) * _per_channel(aux_scale, main)
    out[active:] = main[active:]
    return out


def se_add_dots(grad: Tensor, main: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    """[n, C] each: the inner products of the first n samples of grad with main and with aux."""
    checks.se_add_dots(grad, main, aux)
    wide = _sum_dtype(grad.dtype)
    head = _pixels(grad[: aux.shape[0]].to(wide))
    dtype = weight_dtype(grad.dtype)
    dots = [(head * _pixels(maps[: aux.shape[0]].to(wide))).sum(2) for maps in (main, aux)]
    return dots[0].to(dtype), dots[1].to(dtype)


def se_add_grads(
    grad: Tensor, main_scale: Tensor, aux_scale: Tensor, main_shift: Tensor, aux_shift: Tensor
) -> tuple[Tensor, Tensor]:
    """scale[i] * grad[i] + shift[i] for i < n: of the main stream, where grad[i] follows, of aux.

    grad [N, C, ...]; scales and shifts [n, C].
    """
    checks.se_add_grads(grad, main_scale, aux_scale, main_shift, aux_shift)
    active, wide = aux_scale.shape[0], _sum_dtype(grad.dtype)
    main, aux = empty_maps(grad, grad.shape[0]), empty_maps(grad, active)
    head = grad[:active].to(wide)
    main[:active] = head * _per_channel(main_scale, grad) + _per_channel(main_shift, grad)
    main[active:] = grad[active:]
    aux.copy_(head * _per_channel(aux_scale, grad) + _per_channel(aux_shift, grad))
    return main, aux


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


def _first(faulty: Tensor) -> Tensor:
    """[1]: index of the first True, or -1."""
    index = torch.arange(faulty.numel(), device=faulty.device)
    first = torch.cat([index.masked_fill(~faulty, faulty.numel()), index.new_tensor([2**31])]).min()
    return torch.where(faulty.any(), first, -1).view(1)


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


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _scaled(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows.to(_sum_dtype(rows.dtype)) * _as_column(weights, rows)).to(rows.dtype)


def _as_column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.ndim - 1))


def _pixels(maps: Tensor) -> Tensor:
    """[n, C, the rest of a channel]."""
    return maps.reshape(*maps.shape[:2], math.prod(maps.shape[2:]))


def _per_channel(factors: Tensor, like: Tensor) -> Tensor:
    return factors.view(*factors.shape, *[1] * (like.ndim - 2))
