"""The functional floor of QMF: logits of several modalities, fused by their energies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .. import ops
from ..ops.checks import ENERGY, FLOATING, GIVEN, MAX_MODALITIES, SOFTMAX, UNIFORM
from ..ops.reference.energy import in_plain_torch
from .autograd import Function, follows_forward, on_backend_of_forward
from .deferred import has_values, is_mapped

_WEIGHTINGS = {"energy": ENERGY, "softmax": SOFTMAX, "uniform": UNIFORM}


class EnergyFused(NamedTuple):
    """What `energy_fuse` returns.

    Attributes:
        fused: [N, C], in the dtype of the logits.
        confidence: [N, M], with its gradient; 0 where a modality is absent. In fp32; fp64 for fp64.
        losses: [N, M + 1] in the dtype of the confidence, one per modality and that of `fused`
            last; None without targets.
    """

    fused: Tensor
    confidence: Tensor
    losses: Tensor | None


def energy_fuse(
    logits: Sequence[Tensor],
    targets: Tensor | None = None,
    *,
    weights: str | Tensor = "energy",
    scale: float = 0.1,
    detach_confidence: bool = False,
    present: Tensor | None = None,
) -> EnergyFused:
    """Fuses the logits of several modalities, each weighted by its confidence (QMF).

        confidence_m = scale * logsumexp(logits_m),  fused = sum_m weight_m * logits_m

    (Zhang et al., ICML 2023), in one pass over the logits, and one for all gradients. Sums of fp16
    and bf16 are taken in fp32. Derivatives of any order are exact; those beyond the first, and
    forward mode, are computed by plain PyTorch.

    Args:
        logits: M tensors [N, C], 1 <= M <= 8, floating, of one shape, dtype and device.
        targets: classes, int64 [N]: losses are cross entropies. Labels in 0..1, floating [N, C]:
            losses are means over C of binary cross entropies. They get no gradient.
        weights: "energy": the confidence, not normalised, as published. "softmax": its softmax over
            the modalities. "uniform": their mean. Or given ones, floating [N, M].
        scale: of the confidence; 0.1 as published.
        detach_confidence: weights are constants to the gradient of `fused` and its loss (QMF's
            text-image code; its RGB-D code does not); `confidence` always carries its own.
            Weights that are given carry whatever they carry.
        present: bool [N, M]. A modality that is absent has weight, confidence and loss 0, and its
            logits are not read. A sample that has none is fused to zeros; the loss of that is the
            loss of a uniform guess, log C (log 2 for labels), because that is what it costs.

    Returns:
        `EnergyFused`: fused, confidence, losses.

    Raises:
        TypeError, ValueError: what does not fit, by name. Targets out of range: on a GPU, which
            nobody waits for, their losses are nan instead.
    """
    logits = _check_logits(logits)
    first = logits[0]
    dtype = ops.weight_dtype(first.dtype)
    weighting, given = _check_weights(weights, first, len(logits), dtype)
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"energy_fuse: scale must be a finite number; got {scale!r}")
    if present is not None:
        _check(present, "present", (torch.bool,), (first.shape[0], len(logits)), first)
    if targets is not None:
        targets = _check_targets(targets, first, dtype)
    settings = weighting, float(scale), bool(detach_confidence)
    fused, confidence, losses = _fuse(logits, targets, present, given, *settings)
    return EnergyFused(fused, confidence, None if targets is None else losses)


def _fuse(
    logits: list[Tensor],
    targets: Tensor | None,
    present: Tensor | None,
    weights: Tensor | None,
    weighting: int,
    scale: float,
    detach: bool,
) -> Sequence[Tensor]:
    recorded = [*logits] if weights is None else [*logits, weights]
    # Compilers know how to fuse it.
    if follows_forward() or torch.compiler.is_compiling() or _any_mapped([*recorded, present]):
        plain = in_plain_torch(logits, targets, present, weights, weighting, scale, detach)
        return plain[:3]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in recorded):
        fixed = (targets, present, weighting, scale, detach)
        return _EnergyFuse.apply(*fixed, weights, *logits)[:3]
    return ops.kernels().energy_fuse(logits, targets, present, weights, weighting, scale)[:3]


def _any_mapped(tensors: Sequence[Tensor | None]) -> bool:
    return torch._C._are_functorch_transforms_active() and any(
        is_mapped(tensor) for tensor in tensors if tensor is not None
    )


class _EnergyFuse(Function):
    @staticmethod
    def forward(targets, present, weighting, scale, detach, weights, *logits):
        call = ops.kernels().energy_fuse
        return call(list(logits), targets, present, weights, weighting, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernels = ops.serving()
        targets, present, *settings, weights = inputs[:6]
        ctx.settings = settings
        energies = output[3]
        ctx.mark_non_differentiable(energies, *(() if targets is not None else output[2:3]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(targets, present, weights, energies, *inputs[6:])

    @staticmethod
    @on_backend_of_forward
    def backward(ctx, grad_fused, grad_confidence, grad_losses, _):
        targets, present, weights, energies, *logits = ctx.saved_tensors
        weighting, scale, detach = ctx.settings
        incoming = [grad_fused, grad_confidence, grad_losses]
        nothing = [None] * 5
        if all(grad is None for grad in incoming):
            return *nothing, None, *[None] * len(logits)
        fixed = targets, present
        if torch.is_grad_enabled():
            own = _again(logits, weights, incoming, *fixed, *ctx.settings)
            return *nothing, *own
        call = ops.kernels().energy_fuse_grads
        grads, of_weights = call(
            logits, *fixed, weights, weighting, scale, detach, energies, *incoming
        )
        wanted = ctx.needs_input_grad[6:]
        grads = [grad if need else None for grad, need in zip(grads, wanted, strict=True)]
        return *nothing, of_weights if ctx.needs_input_grad[5] else None, *grads


def _again(
    logits: list[Tensor],
    weights: Tensor | None,
    incoming: list[Tensor | None],
    targets: Tensor | None,
    present: Tensor | None,
    weighting: int,
    scale: float,
    detach: bool,
) -> list[Tensor | None]:
    """The gradients of weights and logits, with a graph of their own."""
    logits = [row.view_as(row) for row in logits]  # one tensor may come twice
    weights = None if weights is None else weights.view_as(weights)
    outputs = in_plain_torch(logits, targets, present, weights, weighting, scale, detach)
    live = [
        (out, grad)
        for out, grad in zip(outputs, incoming, strict=False)
        if grad is not None and out.requires_grad
    ]
    sources = [source for source in (weights, *logits) if _is_followed(source)]
    found: list[Tensor | None] = [None] * len(sources)
    if live:
        of, grads = zip(*live, strict=True)
        found = [*torch.autograd.grad(of, sources, grads, create_graph=True, allow_unused=True)]
    found.reverse()
    return [found.pop() if _is_followed(source) else None for source in (weights, *logits)]


def _is_followed(source: Tensor | None) -> TypeGuard[Tensor]:
    return source is not None and source.requires_grad


def _check_logits(logits: Any) -> list[Tensor]:
    if not isinstance(logits, (list, tuple)) or not 1 <= len(logits) <= MAX_MODALITIES:
        got = len(logits) if isinstance(logits, (list, tuple)) else type(logits).__name__
        raise ValueError(
            f"energy_fuse: logits must be a sequence of 1 to {MAX_MODALITIES} tensors, one per "
            f"modality; got {got}"
        )
    first = logits[0]
    for m, tensor in enumerate(logits):
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
            raise TypeError(f"energy_fuse: logits[{m}] must be floating; got {_told(tensor)}")
        if tensor.ndim != 2 or tensor.shape[1] < 1:
            raise ValueError(f"energy_fuse: logits[{m}] must be [N, C]; got {_told(tensor)}")
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"energy_fuse: logits[{m}] must be {first.dtype}, as logits[0] is; got "
                f"{_told(tensor)}"
            )
        if tensor.shape != first.shape or tensor.device != first.device:
            raise ValueError(
                f"energy_fuse: logits[{m}] must be like logits[0], {_told(first)}; got "
                f"{_told(tensor)}"
            )
    return [*logits]


def _check_weights(
    weights: Any, first: Tensor, modalities: int, dtype: torch.dtype
) -> tuple[int, Tensor | None]:
    if isinstance(weights, Tensor):
        _check(weights, "weights", FLOATING, (first.shape[0], modalities), first)
        return GIVEN, weights.to(dtype)
    if not isinstance(weights, str) or weights not in _WEIGHTINGS:
        names = ", ".join(map(repr, _WEIGHTINGS))
        raise ValueError(
            f"energy_fuse: weights must be {names} or a tensor [N, M]; got {weights!r}"
        )
    return _WEIGHTINGS[weights], None


def _check_targets(targets: Any, first: Tensor, dtype: torch.dtype) -> Tensor:
    """Classes as they are, labels in the dtype in which losses are computed."""
    if isinstance(targets, Tensor) and targets.is_floating_point():
        _check(targets, "targets", FLOATING, tuple(first.shape), first)
        if targets.requires_grad:
            raise ValueError("energy_fuse: targets get no gradient; pass targets.detach()")
        return targets.to(dtype)
    _check(targets, "targets", (torch.int64,), (first.shape[0],), first)
    if not targets.is_cuda and has_values(targets) and len(targets):
        lowest, highest = (extreme.item() for extreme in targets.aminmax())
        if lowest < 0 or highest >= first.shape[1]:
            got = lowest if lowest < 0 else highest
            raise ValueError(
                f"energy_fuse: targets must be classes in 0..{first.shape[1] - 1}; got {got}"
            )
    return targets


def _check(
    tensor: Any, name: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...], first: Tensor
) -> None:
    def wanted() -> str:  # called for messages alone: text would tie a traced graph to its rows
        return f"{dtypes[0]} {list(shape)} on {first.device}; got {_told(tensor)}"

    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        raise TypeError(f"energy_fuse: {name} must be {wanted()}")
    if tuple(tensor.shape) != shape or tensor.device != first.device:
        raise ValueError(f"energy_fuse: {name} must be {wanted()}")


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__
