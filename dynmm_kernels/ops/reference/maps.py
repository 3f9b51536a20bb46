"""se_add and what its gradients need: maps scaled per channel and added, sums over each channel."""

from __future__ import annotations

import math

from torch import Tensor

from .. import checks
from ..checks import weight_dtype
from ..schemas import op
from .layouts import empty_maps, sum_dtype


def _added_like(main: Tensor, aux: Tensor, main_scale: Tensor, aux_scale: Tensor) -> Tensor:
    checks.se_add(main, aux, main_scale, aux_scale)
    return empty_maps(main, main.shape[0])


@op(
    "se_add(Tensor main, Tensor aux, Tensor main_scale, Tensor aux_scale) -> Tensor",
    fake=_added_like,
)
def se_add(main: Tensor, aux: Tensor, main_scale: Tensor, aux_scale: Tensor) -> Tensor:
    """out[i] = main_scale[i] * main[i] + aux_scale[i] * aux[i] for i < n, main[i] behind.

    main [N, C, ...]; aux [n, C, ...], n <= N; scales [n, C].
    """
    checks.se_add(main, aux, main_scale, aux_scale)
    active, wide = aux.shape[0], sum_dtype(main.dtype)
    out = empty_maps(main, main.shape[0])
    scaled = main[:active].to(wide) * _per_channel(main_scale, main)
    out[:active] = scaled + aux.to(wide) * _per_channel(aux_scale, main)
    out[active:] = main[active:]
    return out


def _means_like(maps: Tensor) -> Tensor:
    checks.se_add_means(maps)
    return maps.new_empty(maps.shape[:2], dtype=weight_dtype(maps.dtype))


@op("se_add_means(Tensor maps) -> Tensor", fake=_means_like, sums=True)
def se_add_means(maps: Tensor) -> Tensor:
    """maps [n, C, ...] -> [n, C], the mean of each channel of each sample."""
    checks.se_add_means(maps)
    wide = maps.to(sum_dtype(maps.dtype))
    return _pixels(wide).mean(2).to(weight_dtype(maps.dtype))


def _dots_like(grad: Tensor, main: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    checks.se_add_dots(grad, main, aux)
    shape, dtype = aux.shape[:2], weight_dtype(grad.dtype)
    return grad.new_empty(shape, dtype=dtype), grad.new_empty(shape, dtype=dtype)


@op(
    "se_add_dots(Tensor grad, Tensor main, Tensor aux) -> (Tensor, Tensor)",
    fake=_dots_like,
    sums=True,
)
def se_add_dots(grad: Tensor, main: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    """[n, C] each: the inner products of the first n samples of grad with main and with aux."""
    checks.se_add_dots(grad, main, aux)
    wide = sum_dtype(grad.dtype)
    head = _pixels(grad[: aux.shape[0]].to(wide))
    dtype = weight_dtype(grad.dtype)
    dots = [(head * _pixels(maps[: aux.shape[0]].to(wide))).sum(2) for maps in (main, aux)]
    return dots[0].to(dtype), dots[1].to(dtype)


def _grads_like(
    grad: Tensor, main_scale: Tensor, aux_scale: Tensor, main_shift: Tensor, aux_shift: Tensor
) -> tuple[Tensor, Tensor]:
    checks.se_add_grads(grad, main_scale, aux_scale, main_shift, aux_shift)
    return empty_maps(grad, grad.shape[0]), empty_maps(grad, aux_scale.shape[0])


@op(
    "se_add_grads(Tensor grad, Tensor main_scale, Tensor aux_scale, Tensor main_shift,"
    " Tensor aux_shift) -> (Tensor, Tensor)",
    fake=_grads_like,
)
def se_add_grads(
    grad: Tensor, main_scale: Tensor, aux_scale: Tensor, main_shift: Tensor, aux_shift: Tensor
) -> tuple[Tensor, Tensor]:
    """scale[i] * grad[i] + shift[i] for i < n: of the main stream, where grad[i] follows, of aux.

    grad [N, C, ...]; scales and shifts [n, C].
    """
    checks.se_add_grads(grad, main_scale, aux_scale, main_shift, aux_shift)
    active, wide = aux_scale.shape[0], sum_dtype(grad.dtype)
    main, aux = empty_maps(grad, grad.shape[0]), empty_maps(grad, active)
    head = grad[:active].to(wide)
    main[:active] = head * _per_channel(main_scale, grad) + _per_channel(main_shift, grad)
    main[active:] = grad[active:]
    aux.copy_(head * _per_channel(aux_scale, grad) + _per_channel(aux_shift, grad))
    return main, aux


def _pixels(maps: Tensor) -> Tensor:
    """[n, C, the rest of a channel]."""
    return maps.reshape(*maps.shape[:2], math.prod(maps.shape[2:]))


def _per_channel(factors: Tensor, like: Tensor) -> Tensor:
    return factors.view(*factors.shape, *[1] * (like.ndim - 2))
