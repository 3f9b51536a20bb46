"""energy_fuse_grads: of the logits of several modalities and of their weights.

A program takes some samples, as in energy_fuse. Rows longer than it holds are read twice where the
weights carry gradients: for those, and then for the gradients of the logits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from .energy_rows import (
    SOFTMAX,
    dense,
    divide,
    grown,
    held_rows,
    load_or,
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

CLASSES, LABELS = tl.constexpr(1), tl.constexpr(2)  # what losses compare with; 0: there are none


@triton.jit
def expected(labels, index, one, unit, classes, mine, zeros):
    """What a block is compared with: its labels, or `one` for the class that is named."""
    label = read_or(labels, unit, classes, mine, zeros)
    return label if index is None else tl.where(unit == index, one, 0.0)


@triton.jit
def slope(x, energy, label, classes, LOSS: tl.constexpr):
    """The derivative of a loss by its logits, whose logsumexp is `energy`."""
    if LOSS == LABELS:
        sigmoid = divide(tl.full(x.shape, 1.0, x.dtype), 1 + tl.exp(-x))
        by = divide(sigmoid - label, classes.to(x.dtype))
    else:
        by = tl.exp(x - energy) - label
    return by


@triton.jit
def of_sum(weights, blocks, grad, loss, energy, label, inside, classes, LOSS: tl.constexpr):
    """The gradient of the weighted sum: its own and that of its loss."""
    x = weighed(weights, blocks)
    total = grad.to(x.dtype)
    if LOSS:
        total += loss * slope(x, energy, label, classes, LOSS)
    return tl.where(inside, total, 0.0)


@triton.jit
def of_logits(x, total, weight, change, loss, energy, label, classes, LOSS: tl.constexpr):
    """The gradient of a modality: by the weighted sum, by its energy and by its loss."""
    x = x.to(total.dtype)
    grad = weight * total + change * tl.exp(x - energy)
    if LOSS:
        grad += loss * slope(x, energy, label, classes, LOSS)
    return grad


@triton.jit(do_not_specialize=["strides", "label_stride", "grad_stride", "num_rows", "classes"])
def grads_tile(
    logits,
    strides,
    targets,
    labels,
    label_stride,
    present,
    given,
    energies,
    grad_fused,
    grad_stride,
    grad_confidence,
    grad_losses,
    grads,
    of_given,
    num_rows,
    classes,
    scale: tl.float64,
    WEIGHTING: tl.constexpr,
    LIVE: tl.constexpr,
    STEP: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """LIVE: the weights carry gradients. Without `grad_losses` there are no targets, no labels."""
    SUM: tl.constexpr = energies.dtype.element_ty
    MODALITIES: tl.constexpr = len(logits)
    classes = classes * STEP
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    unit = tl.arange(0, UNITS)[None, :].to(classes.dtype)
    mine = n < num_rows
    each = n * (MODALITIES + 1)

    LOSS: tl.constexpr = 0 if grad_losses is None else (CLASSES if labels is None else LABELS)
    index = None
    one = None
    if labels is not None:
        labels += n * label_stride * STEP
    if targets is not None:
        index, named = name_class(targets, n, num_rows, classes)
        one = tl.where(named, 1.0, float("nan")).to(SUM)
    if grad_fused is not None:
        grad_fused += n * grad_stride * STEP

    zero, zeros = tl.zeros([ROWS, 1], SUM), tl.zeros([ROWS, UNITS], SUM)
    held, rows, blocks, energy, losses, confidence = (), (), (), (), (), ()
    for m in tl.static_range(MODALITIES):
        held = grown(held, held_rows(present, n, num_rows, m, MODALITIES))
        rows = grown(rows, row_of(logits, strides, n, m, STEP))
        energy = grown(energy, tl.load(energies + each + m, mask=mine, other=0))
        losses = grown(losses, load_or(grad_losses, each + m, mine, zero))
        confidence = grown(confidence, tl.full([ROWS, 1], scale, SUM) * energy[m])
        if HELD:
            blocks = grown(blocks, read(rows[m], unit, classes, held[m]))
    last = tl.load(energies + each + MODALITIES, mask=mine, other=0)
    loss = load_or(grad_losses, each + MODALITIES, mine, zero)
    weights = weigh(confidence, held, given, n, WEIGHTING)

    dots = ()
    if HELD:
        label = expected(labels, index, one, unit, classes, mine, zeros)
        total = read_or(grad_fused, unit, classes, mine, zeros)
        total = of_sum(weights, blocks, total, loss, last, label, unit < classes, classes, LOSS)
        for m in tl.static_range(MODALITIES):
            dots = grown(dots, tl.sum(total * blocks[m].to(SUM), 1, keep_dims=True))
    elif LIVE:
        partial = ()
        for _ in tl.static_range(MODALITIES):
            partial = grown(partial, zeros)
        first = classes * 0
        while first < classes:
            at = first + unit
            x = read_all(rows, at, classes, held)
            y = expected(labels, index, one, at, classes, mine, zeros)
            g = read_or(grad_fused, at, classes, mine, zeros)
            g = of_sum(weights, x, g, loss, last, y, at < classes, classes, LOSS)
            sums = ()
            for m in tl.static_range(MODALITIES):
                sums = grown(sums, partial[m] + g * x[m].to(SUM))
            partial = sums
            first += UNITS
        for m in tl.static_range(MODALITIES):
            dots = grown(dots, tl.sum(partial[m], 1, keep_dims=True))

    changes, gains = (), ()
    for m in tl.static_range(MODALITIES if LIVE else 0):
        gains = grown(gains, tl.where(held[m], dots[m], 0.0))
    for m in tl.static_range(MODALITIES):
        change = load_or(grad_confidence, n * MODALITIES + m, mine, zero)
        if of_given is not None:
            tl.store(of_given + n * MODALITIES + m, gains[m], mask=mine)
        elif LIVE and WEIGHTING == SOFTMAX:
            change += weights[m] * (gains[m] - weighed(weights, gains))
        elif LIVE:
            change += gains[m]
        changes = grown(changes, tl.full([ROWS, 1], scale, SUM) * change)

    first = classes * 0
    while first < classes:
        at = first + unit
        if HELD:
            x = blocks
            y = label
            g = total
        else:
            x = read_all(rows, at, classes, held)
            y = expected(labels, index, one, at, classes, mine, zeros)
            g = read_or(grad_fused, at, classes, mine, zeros)
            g = of_sum(weights, x, g, loss, last, y, at < classes, classes, LOSS)
        for m in tl.static_range(MODALITIES):
            own = of_logits(x[m], g, weights[m], changes[m], losses[m], energy[m], y, classes, LOSS)
            own = tl.where(held[m], own, 0.0).to(x[m].dtype)
            tl.store(grads[m] + n * classes + at, own, mask=mine & (at < classes))
        first += UNITS


def energy_fuse_grads(
    logits: list[Tensor],
    targets: Tensor | None,
    present: Tensor | None,
    weights: Tensor | None,
    weighting: int,
    scale: float,
    detach: bool,
    energies: Tensor,
    grad_fused: Tensor | None,
    grad_confidence: Tensor | None,
    grad_losses: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    incoming = grad_fused, grad_confidence, grad_losses
    checks.energy_fuse_grads(logits, targets, present, weights, weighting, energies, *incoming)
    num_rows, classes = logits[0].shape
    grads = [row.new_empty(row.shape) for row in logits]
    of_weights = energies.new_empty((num_rows, len(logits) if weighting == checks.GIVEN else 0))
    if num_rows == 0:
        return grads, of_weights
    rows = [dense(row) for row in logits]
    indices, labels = of_targets(None if grad_losses is None else targets)
    grad_fused = None if grad_fused is None else dense(grad_fused)
    shape = shape_of(len(rows), [*rows, labels, grad_fused])
    step = shape["STEP"]
    launch(
        grads_tile,
        triton.cdiv(num_rows, shape["ROWS"]),
        energies,
        tuple(rows),
        spans(rows, step),
        indices,
        labels,
        span(labels, step),
        packed(present),
        packed(weights),
        packed(energies),
        grad_fused,
        span(grad_fused, step),
        packed(grad_confidence),
        packed(grad_losses),
        tuple(grads),
        of_weights if weighting == checks.GIVEN else None,
        num_rows,
        classes // step,
        scale,
        WEIGHTING=weighting,
        LIVE=weighting == checks.GIVEN or (weighting != checks.UNIFORM and not detach),
        **shape,
    )
    return grads, of_weights
