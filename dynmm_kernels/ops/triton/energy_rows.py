"""What the kernels of energy_fuse and of its gradients share: rows of classes, read block by block.

Whatever belongs to a row is [ROWS, 1], a block of classes [ROWS, UNITS]. Sizes and strides come
divided by STEP, so that Triton knows what they are multiples of without compiling anew for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .configs import CLASSES, tile_for
from .rows import laid_out_as

ENERGY = tl.constexpr(checks.ENERGY)
SOFTMAX = tl.constexpr(checks.SOFTMAX)
GIVEN = tl.constexpr(checks.GIVEN)


@triton.jit
def grown(items, item):
    """A tuple of one more."""
    items += (item,)
    return items


@triton.jit
def divide(a, b):
    """Rounded correctly; in fp64 every division is."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def held_rows(present, n, num_rows, m, MODALITIES: tl.constexpr):
    """Which samples have modality m."""
    mine = n < num_rows
    if present is not None:
        mine = mine & tl.load(present + n * MODALITIES + m, mask=mine, other=0)
    return mine


@triton.jit
def row_of(logits, strides, n, m: tl.constexpr, STEP: tl.constexpr):
    return logits[m] + n * ((strides[m] >> 1) - 1) * STEP


@triton.jit
def read(row, unit, classes, held):
    return tl.load(row + unit, mask=held & (unit < classes), other=0)


@triton.jit
def read_all(rows, unit, classes, held):
    blocks = ()
    for m in tl.static_range(len(rows)):
        blocks = grown(blocks, read(rows[m], unit, classes, held[m]))
    return blocks


@triton.jit
def read_or(row, unit, classes, held, otherwise):
    """`otherwise` where there is no row."""
    return otherwise if row is None else read(row, unit, classes, held)


@triton.jit
def load_or(values, at, mine, otherwise):
    """`otherwise` where there are no values."""
    return otherwise if values is None else tl.load(values + at, mask=mine, other=0)


@triton.jit
def shift(high):
    """What torch.logsumexp subtracts: the maximum, unless it is infinite."""
    return tl.where(tl.abs(high) == float("inf"), 0.0, high)


@triton.jit
def absorb(x, inside, high, total):
    """A block more of a logsumexp: the maximum so far, and sums of exp relative to it, by lane."""
    x = tl.where(inside, x.to(total.dtype), float("-inf"))
    higher = tl.maximum(high, tl.max(x, 1, keep_dims=True))
    total *= tl.where(higher == high, 1.0, tl.exp(high - higher))
    return higher, total + tl.exp(x - shift(higher))


@triton.jit
def logsumexp(high, total):
    return tl.log(tl.sum(total, 1, keep_dims=True)) + shift(high)


@triton.jit
def weigh(confidence, held, given, n, WEIGHTING: tl.constexpr):
    """The weight of each modality, 0 where a sample does not have it."""
    MODALITIES: tl.constexpr = len(held)
    weights = ()
    if WEIGHTING == ENERGY:
        weights = confidence
    elif WEIGHTING == GIVEN:
        for m in tl.static_range(MODALITIES):
            weights = grown(weights, tl.load(given + n * MODALITIES + m, mask=held[m], other=0))
    else:
        high = tl.full(confidence[0].shape, float("-inf"), confidence[0].dtype)
        for m in tl.static_range(MODALITIES):
            high = tl.maximum(high, tl.where(held[m], confidence[m], high))
        shares = ()
        total = tl.zeros_like(high)
        for m in tl.static_range(MODALITIES):
            score = confidence[m] - high if WEIGHTING == SOFTMAX else tl.zeros_like(high)
            shares = grown(shares, tl.where(held[m], tl.exp(score), 0.0))
            total += shares[m]
        for m in tl.static_range(MODALITIES):
            weights = grown(weights, tl.where(held[m], divide(shares[m], total), 0.0))
    return weights


@triton.jit
def weighed(weights, rows):
    """sum_m weights[m] * rows[m], in order."""
    total = weights[0] * rows[0].to(weights[0].dtype)
    for m in tl.static_range(1, len(rows)):
        total += weights[m] * rows[m].to(total.dtype)
    return total


@triton.jit
def name_class(targets, n, num_rows, classes):
    """The class that each target names, whether it names one; 0 where it does not."""
    target = tl.load(targets + n, mask=n < num_rows, other=-1)
    named = (target >= 0) & (target < classes)
    return tl.where(named, target, 0).to(classes.dtype), named


def dense(rows: Tensor) -> Tensor:
    """`rows` themselves where the numbers of each lie side by side, else a copy."""
    return laid_out_as(rows, rows.new_empty((0, *rows.shape[1:])))


def packed(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.resolve_neg().contiguous()


def of_targets(targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Classes and labels, of which one or both are None."""
    if targets is None:
        return None, None
    return (None, dense(targets)) if targets.is_floating_point() else (packed(targets), None)


def spans(rows: Sequence[Tensor], step: int) -> tuple[int, ...]:
    """Strides for `row_of`: as odd numbers above 1, on which Triton never specialises."""
    return tuple(2 * span(row, step) + 3 for row in rows)


def span(rows: Tensor | None, step: int) -> int:
    return 0 if rows is None else rows.stride(0) // step


def shape_of(modalities: int, rows: Sequence[Tensor | None]) -> dict[str, Any]:
    """The tile for `rows`, the first of which says how many classes there are, of which size.

    Many modalities, and fp64, take more registers: smaller tiles, and warps few enough for them.
    """
    given = [row for row in rows if row is not None]
    classes, size = given[0].shape[1], given[0].itemsize
    step = 16 // size
    if classes % step or any(row.stride(0) % step for row in given):
        step = 1
    share = (4 if size == 8 else 1) * (2 if modalities > 3 else 1)
    tile = tile_for(CLASSES, classes * share)
    return {
        "STEP": step,
        "HELD": classes * share <= tile.units,
        "ROWS": tile.rows,
        "UNITS": tile.units // share,
        "num_warps": min(tile.num_warps, 8) if size == 8 else tile.num_warps,
    }
