"""energy_fuse: energies, weights, weighted sum and losses of the logits of several modalities.

A program takes some samples. Where a row fits in its registers it is read once; longer rows are
read twice, for their energies and for what is weighed by them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .energy_rows import (
    absorb,
    dense,
    divide,
    grown,
    held_rows,
    logsumexp,
    name_class,
    of_targets,
    packed,
    read,
    read_all,
    read_or,
    row_of,
    shape_of,
    span,
    spans,
    weigh,
    weighed,
)
from .launch import launch


@triton.jit
def binary_entropy(x, label):
    """Term by term as torch takes it; log(1 + e) exact to rounding also where 1 + e is 1."""
    e = tl.exp(-tl.abs(x))
    more = 1 + e
    log = tl.where(more == 1, e, tl.log(more) * divide(e, more - 1))
    return (1 - label) * x - (tl.minimum(x, 0.0) - log)


@triton.jit
def take_in(state, x, label, inside, ENERGY: tl.constexpr, LABELS: tl.constexpr):
    """A block more of a row: of its logsumexp (ENERGY) and of its loss by labels (LABELS)."""
    high, total, loss = state
    x = x.to(loss.dtype)
    if ENERGY:
        high, total = absorb(x, inside, high, total)
    if LABELS:
        loss += tl.where(inside, binary_entropy(x, label), 0.0)
    return high, total, loss


@triton.jit(do_not_specialize=["strides", "label_stride", "num_rows", "classes"])
def fuse_tile(
    logits,
    strides,
    targets,
    labels,
    label_stride,
    present,
    given,
    fused,
    confidence,
    losses,
    energies,
    num_rows,
    classes,
    scale: tl.float64,
    WEIGHTING: tl.constexpr,
    STEP: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    SUM: tl.constexpr = confidence.dtype.element_ty
    MODALITIES: tl.constexpr = len(logits)
    classes = classes * STEP
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    unit = tl.arange(0, UNITS)[None, :].to(classes.dtype)
    mine = n < num_rows
    each = n * (MODALITIES + 1)
    to = fused + n * classes
    if labels is not None:
        labels += n * label_stride * STEP
    zeros = tl.zeros([ROWS, UNITS], SUM)
    nothing = (tl.full([ROWS, 1], float("-inf"), SUM), zeros, zeros)

    LABELS: tl.constexpr = labels is not None
    label = read_or(labels, unit, classes, mine, zeros) if HELD else zeros
    held, rows, blocks, energy, scaled = (), (), (), (), ()
    for m in tl.static_range(MODALITIES):
        held = grown(held, held_rows(present, n, num_rows, m, MODALITIES))
        rows = grown(rows, row_of(logits, strides, n, m, STEP))
        state = nothing
        if HELD:
            blocks = grown(blocks, read(rows[m], unit, classes, held[m]))
            state = take_in(state, blocks[m], label, unit < classes, True, LABELS)
        else:
            first = classes * 0
            while first < classes:
                at = first + unit
                x = read(rows[m], at, classes, held[m])
                y = read_or(labels, at, classes, mine, zeros)
                state = take_in(state, x, y, at < classes, True, LABELS)
                first += UNITS
        high, total, loss = state
        energy = grown(energy, tl.where(held[m], logsumexp(high, total), 0.0))
        scaled = grown(scaled, tl.full([ROWS, 1], scale, SUM) * energy[m])
        tl.store(energies + each + m, energy[m], mask=mine)
        tl.store(confidence + n * MODALITIES + m, scaled[m], mask=mine)
        if labels is not None:
            mean = divide(tl.sum(loss, 1, keep_dims=True), classes.to(SUM))
            tl.store(losses + each + m, tl.where(held[m], mean, 0.0), mask=mine)

    weights = weigh(scaled, held, given, n, WEIGHTING)
    state = nothing
    if HELD:
        x = weighed(weights, blocks)
        tl.store(to + unit, x.to(fused.dtype.element_ty), mask=mine & (unit < classes))
        state = take_in(state, x, label, unit < classes, targets is not None, LABELS)
    else:
        first = classes * 0
        while first < classes:
            at = first + unit
            x = weighed(weights, read_all(rows, at, classes, held))
            tl.store(to + at, x.to(fused.dtype.element_ty), mask=mine & (at < classes))
            y = read_or(labels, at, classes, mine, zeros)
            state = take_in(state, x, y, at < classes, targets is not None, LABELS)
            first += UNITS
    high, total, loss = state

    last = tl.zeros([ROWS, 1], SUM)
    if targets is not None:
        index, named = name_class(targets, n, num_rows, classes)
        chosen = ()
        for m in tl.static_range(MODALITIES):
            chosen = grown(chosen, tl.load(rows[m] + index, mask=held[m] & named, other=0))
            own = tl.where(named, energy[m] - chosen[m].to(SUM), float("nan"))
            own = tl.where(held[m], own, 0.0)
            tl.store(losses + each + m, own, mask=mine)
        last = logsumexp(high, total)
        own = tl.where(named, last - weighed(weights, chosen), float("nan"))
        tl.store(losses + each + MODALITIES, own, mask=mine)
    if labels is not None:
        mean = divide(tl.sum(loss, 1, keep_dims=True), classes.to(SUM))
        tl.store(losses + each + MODALITIES, mean, mask=mine)
    tl.store(energies + each + MODALITIES, last, mask=mine)


def energy_fuse(
    logits: list[Tensor],
    targets: Tensor | None,
    present: Tensor | None,
    weights: Tensor | None,
    weighting: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.energy_fuse(logits, targets, present, weights, weighting)
    first, modalities = logits[0], len(logits)
    num_rows, classes = first.shape
    dtype = checks.weight_dtype(first.dtype)
    fused = first.new_empty(first.shape)
    confidence = first.new_empty((num_rows, modalities), dtype=dtype)
    each = (num_rows, modalities + 1)
    losses = first.new_empty(each if targets is not None else (num_rows, 0), dtype=dtype)
    energies = first.new_empty(each, dtype=dtype)
    if num_rows == 0:
        return fused, confidence, losses, energies
    rows = [dense(row) for row in logits]
    indices, labels = of_targets(targets)
    shape = shape_of(modalities, [*rows, labels])
    step = shape["STEP"]
    launch(
        fuse_tile,
        triton.cdiv(num_rows, shape["ROWS"]),
        fused,
        tuple(rows),
        spans(rows, step),
        indices,
        labels,
        span(labels, step),
        packed(present),
        packed(weights),
        fused,
        confidence,
        None if targets is None else losses,
        energies,
        num_rows,
        classes // step,
        scale,
        WEIGHTING=weighting,
        **shape,
    )
    return fused, confidence, losses, energies
