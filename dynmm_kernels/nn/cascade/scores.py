"""Scores: how sure a cascade is of each sample after a stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..memory import versions
from ..notes import note_origin

Score = str | Callable[[Tensor], Tensor]


def probability(logits: Tensor) -> Tensor:
    """The largest softmax probability, 1/C..1."""
    return logits.softmax(1).amax(1)


def margin(logits: Tensor) -> Tensor:
    """How far the largest softmax probability is above the second, 0..1."""
    first, second = logits.softmax(1).topk(2, dim=1).values.unbind(1)
    return first - second


def entropy(logits: Tensor) -> Tensor:
    """1 - the entropy of the softmax over log C, 0..1."""
    nats = torch.special.entr(logits.softmax(1)).sum(1)
    return 1 - nats / math.log(logits.shape[1])


def energy(logits: Tensor) -> Tensor:
    """logsumexp: the negative free energy, any number."""
    return logits.logsumexp(1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": probability,
    "margin": margin,
    "entropy": entropy,
    "energy": energy,
}


def check_score(score: Any) -> None:
    """Raises ValueError or TypeError unless `measure` can use it."""
    if isinstance(score, str) and score in SCORES:
        return
    wanted = ", ".join(map(repr, SCORES))
    message = f"CascadeFusion: score must be one of {wanted}, or callable(logits) -> [n]"
    if isinstance(score, str):
        raise ValueError(f"{message}; got {score!r}")
    if not callable(score):
        raise TypeError(f"{message}; got {type(score).__name__}")


def measure(score: Score, logits: Tensor) -> Tensor:
    """The scores [n] of logits [n, C], without a graph; in fp32 or wider where they are named.

    Raises:
        ValueError, TypeError: one class only; a callable that returns anything but floating [n], or
            writes into the logits.
    """
    logits = logits.detach()
    if isinstance(score, str):
        if logits.shape[1] < 2 and score != "energy":
            raise ValueError(
                f"CascadeFusion: score={score!r} compares classes, and logits have shape "
                f"{list(logits.shape)}; use 'energy' or a callable"
            )
        return SCORES[score](logits.to(torch.promote_types(logits.dtype, torch.float32)))
    traced = is_dynamo_compiling()  # a compiler knows who writes where
    before = [] if traced else versions([logits])
    try:
        scores = score(logits)
    except Exception as error:
        note_origin(error, "score")
        raise
    rows = logits.shape[0]
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"CascadeFusion: score must return a floating tensor [{rows}]; got {got}")
    if list(scores.shape) != [rows] or scores.device != logits.device:
        raise ValueError(
            f"CascadeFusion: score must return one number per sample, shape [{rows}] on "
            f"{logits.device}; got {list(scores.shape)} on {scores.device}"
        )
    if not traced and versions([logits]) != before:
        raise ValueError(
            "CascadeFusion: score must not write into the logits, which are returned as well; let "
            "its first operation work out of place"
        )
    return scores.detach()
