"""energy_fuse and its gradients: logits of several modalities, weighted per sample and summed."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..checks import ENERGY, GIVEN, SOFTMAX, weight_dtype
from ..schemas import op


def _fused_like(
    logits: list[Tensor],
    targets: Tensor | None,
    present: Tensor | None,
    weights: Tensor | None,
    weighting: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.energy_fuse(logits, targets, present, weights, weighting)
    first, modalities = logits[0], len(logits)
    rows, dtype = first.shape[0], weight_dtype(first.dtype)
    return (
        first.new_empty(first.shape),
        first.new_empty((rows, modalities), dtype=dtype),
        first.new_empty((rows, 0 if targets is None else modalities + 1), dtype=dtype),
        first.new_empty((rows, modalities + 1), dtype=dtype),
    )


@op(
    "energy_fuse(Tensor[] logits, Tensor? targets, Tensor? present, Tensor? weights, int weighting,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fused_like,
    sums=True,
)
def energy_fuse(
    logits: list[Tensor],
    targets: Tensor | None,
    present: Tensor | None,
    weights: Tensor | None,
    weighting: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fused [N, C], confidence [N, M], losses [N, M + 1] and energies [N, M + 1] of M logits.

    energies[m] = logsumexp(logits[m]) and confidence[m] = scale * energies[m], both 0 where sample
    n has no modality m by present [N, M]; fused = sum_m w_m * logits[m]. `weighting` says what w
    is: the confidence, its softmax over the modalities present, one over their number, or `weights`
    [N, M]; 0 for what is absent, whose logits are not read. losses: cross entropy for int64 targets
    [N] (nan where they name no class), the mean over C of the binary cross entropy for floating
    ones [N, C]; those of the modalities, 0 where absent, then that of fused; [N, 0] without
    targets. Last in energies: logsumexp(fused) where the cross entropy needs it, else 0.
    """
    checks.energy_fuse(logits, targets, present, weights, weighting)
    return in_plain_torch(logits, targets, present, weights, weighting, scale)


def in_plain_torch(
    logits: list[Tensor],
    targets: Tensor | None,
    present: Tensor | None,
    weights: Tensor | None,
    weighting: int,
    scale: float,
    detach: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`energy_fuse`, as torch differentiates it to any order; `detach`: weights are constants."""
    rows, wide = _wide(logits, present)
    energies = torch.stack([row.logsumexp(1) for row in wide], 1)
    if present is not None:
        energies = energies.masked_fill(~present, 0)
    confidence = scale * energies
    weighed = confidence.detach() if detach else confidence
    fused = _fused(wide, _weights(weighed, present, weights, weighting))
    losses, last = energies.new_empty((rows, 0)), energies.new_zeros(rows)
    if targets is not None:
        if not targets.is_floating_point():
            last = fused.logsumexp(1)
        each = [
            _losses(row, targets, energy)
            for row, energy in zip([*wide, fused], [*energies.unbind(1), last], strict=True)
        ]
        losses = torch.stack(each, 1)
        if present is not None:
            own = losses[:, :-1].masked_fill(~present, 0)
            losses = torch.cat([own, losses[:, -1:]], 1)
    energies = torch.cat([energies, last[:, None]], 1)
    return fused.to(logits[0].dtype), confidence, losses, energies


def _grads_like(
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
    grads = (grad_fused, grad_confidence, grad_losses)
    checks.energy_fuse_grads(logits, targets, present, weights, weighting, energies, *grads)
    width = len(logits) if weighting == GIVEN else 0
    of_weights = energies.new_empty((energies.shape[0], width))
    return [row.new_empty(row.shape) for row in logits], of_weights


@op(
    "energy_fuse_grads(Tensor[] logits, Tensor? targets, Tensor? present, Tensor? weights,"
    " int weighting, float scale, bool detach, Tensor energies, Tensor? grad_fused,"
    " Tensor? grad_confidence, Tensor? grad_losses) -> (Tensor[], Tensor)",
    fake=_grads_like,
    sums=True,
)
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
    """The gradients of M logits [N, C], and of `weights` [N, M] ([N, 0] where there are none).

    `energies` as `energy_fuse` returned them; a gradient that is None is zero. With `detach` the
    weights are constants. What is absent gets zeros.
    """
    grads = (grad_fused, grad_confidence, grad_losses)
    checks.energy_fuse_grads(logits, targets, present, weights, weighting, energies, *grads)
    rows, wide = _wide(logits, present)
    dtype = energies.dtype
    w = _weights(scale * energies[:, :-1], present, weights, weighting)
    fused = _fused(wide, w)

    of_fused = torch.zeros_like(fused) if grad_fused is None else grad_fused.to(dtype)
    if grad_losses is not None and targets is not None:
        of_fused = of_fused + grad_losses[:, -1:] * _slopes(fused, targets, energies[:, -1:])
    of_weights = torch.stack([(of_fused * row).sum(1) for row in wide], 1)
    if present is not None:
        of_weights = of_weights.masked_fill(~present, 0)
    of_confidence = torch.zeros_like(w) if grad_confidence is None else grad_confidence.clone()
    if not detach and weighting == ENERGY:
        of_confidence += of_weights
    if not detach and weighting == SOFTMAX:
        of_confidence += w * (of_weights - (w * of_weights).sum(1, keepdim=True))

    of_logits = []
    for m, row in enumerate(wide):
        energy = energies[:, m, None]
        grad = w[:, m, None] * of_fused
        grad = grad + scale * of_confidence[:, m, None] * (row - energy).exp()
        if grad_losses is not None and targets is not None:
            grad = grad + grad_losses[:, m, None] * _slopes(row, targets, energy)
        if present is not None:
            grad = grad.masked_fill(~present[:, m, None], 0)
        of_logits.append(grad.to(logits[m].dtype))
    if weighting != GIVEN:
        of_weights = of_weights.new_empty((rows, 0))
    return of_logits, of_weights


def _wide(logits: list[Tensor], present: Tensor | None) -> tuple[int, list[Tensor]]:
    """N, and the logits in the dtype of sums; zeros where absent."""
    wide = [row.to(weight_dtype(row.dtype)) for row in logits]
    if present is not None:
        wide = [row.masked_fill(~present[:, m, None], 0) for m, row in enumerate(wide)]
    return wide[0].shape[0], wide


def _fused(wide: list[Tensor], weights: Tensor) -> Tensor:
    fused = weights[:, :1] * wide[0]
    for m, row in enumerate(wide[1:], start=1):
        fused = fused + weights[:, m, None] * row
    return fused


def _weights(
    confidence: Tensor, present: Tensor | None, weights: Tensor | None, weighting: int
) -> Tensor:
    """[N, M], 0 where absent."""
    if weighting == ENERGY:
        return confidence
    if weights is not None:
        return weights if present is None else weights.masked_fill(~present, 0)
    scores = confidence if weighting == SOFTMAX else torch.zeros_like(confidence)
    if present is None:
        return scores.softmax(1)
    shares = scores.masked_fill(~present, -torch.inf).softmax(1)
    return shares.masked_fill(~present, 0)


def _losses(row: Tensor, targets: Tensor, energy: Tensor) -> Tensor:
    """[N]: the cross entropy of logits [N, C] whose logsumexp is `energy`, or the binary one."""
    if targets.is_floating_point():
        return torch.nn.functional.binary_cross_entropy_with_logits(
            row, targets, reduction="none"
        ).mean(1)
    named = (targets >= 0) & (targets < row.shape[1])
    chosen = row.gather(1, torch.where(named, targets, 0)[:, None])[:, 0]
    return torch.where(named, energy - chosen, torch.nan)


def _slopes(row: Tensor, targets: Tensor, energy: Tensor) -> Tensor:
    """[N, C]: the derivative of `_losses`."""
    if targets.is_floating_point():
        return (row.sigmoid() - targets) / row.shape[1]
    named = (targets >= 0) & (targets < row.shape[1])
    index = torch.where(named, targets, 0)[:, None]
    ones = torch.where(named, 1.0, torch.nan).to(row.dtype)[:, None]
    return (row - energy).exp().scatter_add(1, index, -ones)
