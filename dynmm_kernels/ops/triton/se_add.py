"""se_add: scaled addition on the first samples of a batch; se_add_grads: of both its streams.

A run is what lies together: the pixels of a channel, or with channels last (LAST) the channels of a
pixel. Samples are some number of runs, at any distance from each other.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import checks, reference
from .configs import SUM, tile_for
from .launch import launch
from .rows import laid_out_as, tile


@triton.jit
def places(run, unit, runs, units, LAST: tl.constexpr):
    """Of a tile: each run's sample, the elements within the sample, and their factors in [n, C]."""
    n = run // runs
    at = ((run - n * runs) * units)[:, None] + unit[None, :]
    return n, at, (n * units)[:, None] + unit[None, :] if LAST else run[:, None]


@triton.jit(do_not_specialize=["num_runs", "active"])
def scale_and_add(
    main,
    aux,
    main_scale,
    aux_scale,
    out,
    main_stride,
    aux_stride,
    num_runs,
    active,
    runs,
    units,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    run, unit = tile(units, ROWS, UNITS)
    n, at, factor = places(run, unit, runs, units, LAST)
    inside = (run < num_runs)[:, None] & (unit < units)[None, :]
    fused = inside & (n < active)[:, None]
    x = tl.load(main + (n * main_stride)[:, None] + at, mask=inside, other=0)
    y = tl.load(aux + (n * aux_stride)[:, None] + at, mask=fused, other=0)
    s = tl.load(main_scale + factor, mask=fused, other=0)
    t = tl.load(aux_scale + factor, mask=fused, other=0)
    total = (x.to(s.dtype) * s + y.to(t.dtype) * t).to(x.dtype)
    to = out + (run * units)[:, None] + unit[None, :]
    tl.store(to, tl.where(fused, total, x), mask=inside)


@triton.jit(do_not_specialize=["num_runs", "active"])
def both_grads(
    grad,
    main_scale,
    aux_scale,
    main_shift,
    aux_shift,
    main,
    aux,
    grad_stride,
    num_runs,
    active,
    runs,
    units,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    run, unit = tile(units, ROWS, UNITS)
    n, at, factor = places(run, unit, runs, units, LAST)
    inside = (run < num_runs)[:, None] & (unit < units)[None, :]
    fused = inside & (n < active)[:, None]
    x = tl.load(grad + (n * grad_stride)[:, None] + at, mask=inside, other=0)
    to = (run * units)[:, None] + unit[None, :]
    s = tl.load(main_scale + factor, mask=fused, other=0)
    shift = tl.load(main_shift + factor, mask=fused, other=0)
    of_main = (x.to(s.dtype) * s + shift).to(x.dtype)
    tl.store(main + to, tl.where(fused, of_main, x), mask=inside)
    t = tl.load(aux_scale + factor, mask=fused, other=0)
    shift = tl.load(aux_shift + factor, mask=fused, other=0)
    tl.store(aux + to, (x.to(t.dtype) * t + shift).to(x.dtype), mask=fused)


def run_shape(maps: Tensor) -> tuple[bool, int, int]:
    """LAST, the runs of a sample and the elements of a run. A single pixel is one run."""
    channels, pixels = maps.shape[1], math.prod(maps.shape[2:])
    return (True, pixels, channels) if maps.stride(1) == 1 else (False, channels, pixels)


def launch_over_runs(kernel: Any, out: Tensor, active: int, *arguments: Any) -> None:
    """Over all samples of `out`, active or not."""
    last, runs, units = run_shape(out)
    size, num_runs = tile_for(SUM, units), out.shape[0] * runs
    launch(
        kernel,
        triton.cdiv(num_runs, size.rows) * triton.cdiv(units, size.units),
        out,
        *arguments,
        num_runs,
        active,
        runs,
        units,
        LAST=last,
        ROWS=size.rows,
        UNITS=size.units,
        num_warps=size.num_warps,
    )


def se_add(main: Tensor, aux: Tensor, main_scale: Tensor, aux_scale: Tensor) -> Tensor:
    checks.se_add(main, aux, main_scale, aux_scale)
    out = reference.empty_maps(main, main.shape[0])
    if out.numel() == 0:
        return out
    main, aux = laid_out_as(main, out), laid_out_as(aux, out)
    scales = main_scale.contiguous(), aux_scale.contiguous()
    strides = main.stride(0), aux.stride(0)
    launch_over_runs(scale_and_add, out, aux.shape[0], main, aux, *scales, out, *strides)
    return out


def se_add_grads(
    grad: Tensor, main_scale: Tensor, aux_scale: Tensor, main_shift: Tensor, aux_shift: Tensor
) -> tuple[Tensor, Tensor]:
    checks.se_add_grads(grad, main_scale, aux_scale, main_shift, aux_shift)
    active = main_scale.shape[0]
    main, aux = reference.empty_maps(grad, grad.shape[0]), reference.empty_maps(grad, active)
    if main.numel() == 0:
        return main, aux
    grad = laid_out_as(grad, main)
    factors = [f.contiguous() for f in (main_scale, aux_scale, main_shift, aux_shift)]
    launch_over_runs(both_grads, main, active, grad, *factors, main, aux, grad.stride(0))
    return main, aux
