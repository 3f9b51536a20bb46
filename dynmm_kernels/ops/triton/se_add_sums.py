"""se_add_means, se_add_dots: sums over each channel of each sample, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import checks, reference
from .configs import DOT, SPAN, SPAN_PARTS, SPAN_STEPS, tile_for
from .launch import launch
from .rows import laid_out_as
from .se_add import run_shape


@triton.jit(do_not_specialize=["active"])
def channel_sums(
    maps,
    strides,
    sums,
    active,
    channels,
    pixels,
    parts,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """sums [parts, n, C]: of the products of maps[0] with maps[1] and maps[2], or means of maps[0].

    A program takes some channels, along one axis of its tile, and every parts-th span of pixels.
    """
    part = tl.program_id(0) % parts
    program = (tl.program_id(0) // parts).to(tl.int64)
    LANES: tl.constexpr = ROWS if LAST else UNITS
    if LAST:
        across = tl.cdiv(channels, UNITS)
        n = program // across
        channel = (program - n * across) * UNITS + tl.arange(0, UNITS)[None, :]
        held = channel < channels
        at, step, pixel = channel, channels, tl.arange(0, ROWS)[:, None]
    else:
        entry = program * ROWS + tl.arange(0, ROWS)[:, None]
        n = entry // channels
        channel = entry - n * channels
        held = n < active
        at, step, pixel = channel * pixels, 1, tl.arange(0, UNITS)[None, :]
    partial = tl.zeros([ROWS, UNITS], sums[0].dtype.element_ty)
    other_partial = partial
    first = part * LANES
    while first < pixels:
        inside = held & (first + pixel < pixels)
        place = at + (first + pixel).to(tl.int64) * step
        x = tl.load(maps[0] + n * strides[0] + place, mask=inside, other=0).to(partial.dtype)
        if len(maps) == 1:
            partial += x
        else:
            y = tl.load(maps[1] + n * strides[1] + place, mask=inside, other=0)
            z = tl.load(maps[2] + n * strides[2] + place, mask=inside, other=0)
            partial += x * y.to(x.dtype)
            other_partial += x * z.to(x.dtype)
        first += parts * LANES
    to = (part * active.to(tl.int64) + n) * channels + channel
    total = tl.sum(partial, 0 if LAST else 1, keep_dims=True)
    if len(maps) == 1:
        tl.store(sums[0] + to, total / pixels, mask=held)
    else:
        tl.store(sums[0] + to, total, mask=held)
        other = tl.sum(other_partial, 0 if LAST else 1, keep_dims=True)
        tl.store(sums[1] + to, other, mask=held)


def sum_channels(grad: Tensor, *others: Tensor) -> list[Tensor]:
    """[n, C] for each of the others, or the means of grad where there are none."""
    active, channels = grad.shape[:2]
    like = reference.empty_maps(grad, 0)
    last, runs, units = run_shape(like)
    pixels = runs if last else units
    if last:
        size = tile_for(SPAN, channels)
        programs = active * triton.cdiv(channels, size.units)
        parts = min(SPAN_PARTS, max(1, triton.cdiv(pixels, size.rows * SPAN_STEPS)))
    else:
        size = tile_for(DOT, pixels)
        programs, parts = triton.cdiv(active * channels, size.rows), 1
    maps = tuple(laid_out_as(x[:active], like) for x in (grad, *others))
    shape, dtype = (parts, active, channels), checks.weight_dtype(grad.dtype)
    sums = tuple(grad.new_empty(shape, dtype=dtype) for _ in others or maps)
    launch(
        channel_sums,
        programs * parts,
        grad,
        maps,
        tuple(x.stride(0) for x in maps),
        sums,
        active,
        channels,
        pixels,
        parts,
        LAST=last,
        ROWS=size.rows,
        UNITS=size.units,
        num_warps=size.num_warps,
    )
    return [x[0] if parts == 1 else x.sum(0) for x in sums]


def se_add_means(maps: Tensor) -> Tensor:
    checks.se_add_means(maps)
    return sum_channels(maps)[0]


def se_add_dots(grad: Tensor, main: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    checks.se_add_dots(grad, main, aux)
    of_main, of_aux = sum_channels(grad[: aux.shape[0]], main, aux)
    return of_main, of_aux
