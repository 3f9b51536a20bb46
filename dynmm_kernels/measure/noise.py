"""The noise under which QMF measures robustness: each modality by itself, half of the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scale = float | Tensor

_KINDS = ("gaussian", "salt_and_pepper")


class Corrupted(NamedTuple):
    """Noisy copies, and where the noise is.

    Attributes:
        modalities: as given, in new memory; rows without noise are the same bit for bit.
        rows: bool [N, M], True where the sample's modality is noisy.
    """

    modalities: tuple[Tensor, ...]
    rows: Tensor


def corrupt(
    modalities: Sequence[Tensor],
    kind: str = "gaussian",
    *,
    epsilon: float,
    generator: torch.Generator | None = None,
    share: float = 0.5,
    unit: Scale | Sequence[Scale] = 1 / 255,
    black: Scale | Sequence[Scale] = 0.0,
    density: float = 0.1,
    same_channels: bool = True,
    clip: bool = False,
) -> Corrupted:
    """Adds noise to test data, by the protocol of QMF (Zhang et al., ICML 2023; epsilon 0, 5, 10).

    Every modality of every sample is noisy with probability one half, independently, so that a
    quarter of the samples is clean, and of two modalities a quarter has both noisy. With

        "gaussian"         N(0, epsilon) is added, in steps of a pixel (0..255), as in the RGB-D
                           code; its text-image code means ten times that, so give epsilon=10 * e
        "salt_and_pepper"  of those samples, epsilon per cent have 10 % of their pixels turned
                           black or white, as in the text-image code

    The published code draws the same noise for every image, by a seed in the transformation, and
    wraps around what falls below black; here draws differ, and nothing wraps.

    Args:
        modalities: M floating tensors [N, ...]; of [N, C, H, W] dimension 1 are channels.
        kind: "gaussian" or "salt_and_pepper".
        epsilon: the severity, >= 0; at most 100 for "salt_and_pepper". 0: no noise at all.
        generator: makes it repeatable; its rows do not depend on epsilon where that is Gaussian.
            Noise is drawn on its device, so one on the CPU gives the same noise to a GPU.
        share: probability that a modality of a sample is noisy.
        unit: what a step of one pixel is in the values given: 1 for 0..255, 1/255 for 0..1, and
            1 / (255 * std) after normalisation; a number or a tensor that broadcasts to a sample,
            or one of them per modality.
        black: the value of pixel 0, in the same forms; white is black + 255 * unit.
        density: the share of pixels that salt and pepper hit.
        same_channels: the noise of an image is the same in all channels, as the code has it.
        clip: Gaussian noise ends at black and white. Leave it out for features.

    Raises:
        TypeError, ValueError: what does not fit; the message names it.
    """
    size = _check(modalities, kind, epsilon, share, density)
    units = _per_modality("unit", unit, len(modalities))
    blacks = _per_modality("black", black, len(modalities))
    chance = share * epsilon / 100 if kind == "salt_and_pepper" else share
    device = modalities[0].device if generator is None else generator.device
    rows = torch.rand(size, len(modalities), generator=generator, device=device) < chance
    if epsilon == 0:
        rows = torch.zeros_like(rows)
    noisy = []
    for column, clean, step, zero in zip(rows.unbind(1), modalities, units, blacks, strict=True):
        shape = [*clean.shape]
        if same_channels and clean.ndim == 4:
            shape[1] = 1
        step, zero = (torch.as_tensor(x).to(clean) for x in (step, zero))
        white = zero + 255 * step
        if kind == "gaussian":
            noise = torch.randn(shape, generator=generator, device=device)
            other = clean + noise.to(clean) * (epsilon * step)
            if clip:
                other = other.clamp(zero, white)
        else:
            draw = torch.rand(shape, generator=generator, device=device).to(clean.device)
            other = torch.where(draw < density / 2, zero, torch.where(draw < density, white, clean))
        hit = column.to(clean.device).view(-1, *[1] * (clean.ndim - 1))
        noisy.append(torch.where(hit, other, clean))
    return Corrupted(tuple(noisy), rows.to(modalities[0].device))


def _per_modality(name: str, scale: Scale | Sequence[Scale], count: int) -> list[Scale]:
    if not isinstance(scale, (list, tuple)):
        return [scale] * count  # type: ignore[list-item]
    if len(scale) != count:
        raise ValueError(f"corrupt: wanted one {name}, or one per modality, {count}; got {scale!r}")
    return [*scale]


def _check(
    modalities: Sequence[Tensor], kind: str, epsilon: float, share: float, density: float
) -> int:
    """N."""
    if kind not in _KINDS:
        raise ValueError(f"corrupt: kind must be 'gaussian' or 'salt_and_pepper'; got {kind!r}")
    most = 100 if kind == "salt_and_pepper" else math.inf
    if not (0 <= epsilon <= most and math.isfinite(epsilon)):
        wanted = "in 0..100, per cent" if kind == "salt_and_pepper" else "finite and >= 0"
        raise ValueError(f"corrupt: epsilon must be {wanted}; got {epsilon}")
    for name, value in (("share", share), ("density", density)):
        if not 0 <= value <= 1:
            raise ValueError(f"corrupt: {name} must be in 0..1; got {value}")
    if not isinstance(modalities, (list, tuple)) or not modalities:
        raise TypeError(
            f"corrupt: modalities must be a list of tensors [N, ...], at least one; got "
            f"{type(modalities).__name__}"
        )
    for m, values in enumerate(modalities):
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"corrupt: modality {m} must be a floating tensor; got {got}")
        if values.ndim == 0 or len(values) != len(modalities[0]):
            raise ValueError(
                f"corrupt: modality {m} must have one row per sample, as modality 0 has; got "
                f"{list(values.shape)} and {list(modalities[0].shape)}"
            )
    return len(modalities[0])
