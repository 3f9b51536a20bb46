"""How the logits of the stages so far become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import movement
from ...functional.energy import MAX_MODALITIES, energy_fuse
from ..branch import Branch, as_branch, in_place_of
from ..calling import as_module

Fuse = str | Branch
FUSES = ("energy", "mean", "last")


def as_fuse(fuse: Any, before: nn.Module | None) -> Fuse:
    """One of `FUSES`, or the module or function as a Branch; in the place of `before`.

    Raises:
        ValueError, TypeError: anything else.
    """
    if callable(fuse):
        fuse = as_module(fuse, "CascadeFusion: fuse")
        return as_branch(in_place_of(before, fuse), "fuse", "fuse")
    wanted = ", ".join(map(repr, FUSES))
    message = f"CascadeFusion: fuse must be one of {wanted}, or a module(list of logits) -> logits"
    if not isinstance(fuse, str):
        raise TypeError(f"{message}; got {type(fuse).__name__}")
    if fuse not in FUSES:
        raise ValueError(f"{message}; got {fuse!r}")
    return fuse


def fuse_logits(fuse: Fuse, logits: Sequence[Tensor]) -> Tensor:
    """[n, C] out of what the stages so far returned, [n, C] each.

    Raises:
        ValueError, TypeError: a module that returns anything but floating [n, C], or writes into
            what it is given.
    """
    if fuse == "last":
        return logits[-1]
    if isinstance(fuse, Branch):
        return _ask(fuse, logits)
    logits = movement.same_dtype(logits)
    if fuse == "energy":
        return _energy(logits)
    return logits[0] if len(logits) == 1 else torch.stack([*logits]).mean(0)


def _energy(logits: Sequence[Tensor]) -> Tensor:
    """sum_m 0.1 * logsumexp(x_m) * x_m (QMF), of any number of modalities."""
    groups = [logits[m : m + MAX_MODALITIES] for m in range(0, len(logits), MAX_MODALITIES)]
    first, *others = [energy_fuse(group).fused for group in groups]
    return sum(others, first)


def _ask(fuse: Branch, logits: Sequence[Tensor]) -> Tensor:
    fused = fuse.call_reading(logits, ([*logits],))
    like = logits[-1]
    if not isinstance(fused, Tensor) or not fused.is_floating_point():
        got = fused.dtype if isinstance(fused, Tensor) else type(fused).__name__
        raise TypeError(
            f"{fuse.label} must return floating logits [n, C] = {list(like.shape)}; got {got}"
        )
    if fused.shape != like.shape or fused.device != like.device:
        raise ValueError(
            f"{fuse.label} must return logits [n, C] = {list(like.shape)} on {like.device}, as the "
            f"stages do; got {list(fused.shape)} on {fused.device}"
        )
    return fused
