"""How any module is asked as a gate, gates ready to use, and the temperature of their training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import checks, ranges
from .branch import Branch, as_branch, in_place_of
from .calling import Callee, as_module

_MEASURES = ("probability", "entropy", "energy")


def ask(
    gate: Branch,
    arguments: Sequence[Any],
    read: Iterable[Tensor],
    num_rows: int | None,
    num_columns: int,
    device: torch.device | None,
) -> Tensor:
    """Logits [N, C] of a gate, checked.

    Args:
        arguments: what it selected.
        read: what others read as well, so that it must not write there.
        num_rows, device: of its inputs; None where they do not tell.

    Raises:
        ValueError, TypeError: anything but floating [N, C] on the device.
    """
    if not ranges.recording():
        return ask_unnamed(gate, arguments, read, num_rows, num_columns, device)
    with ranges.asking(gate.title or f"gate[{gate.name}]"):
        return ask_unnamed(gate, arguments, read, num_rows, num_columns, device)


def ask_unnamed(
    gate: Branch,
    arguments: Sequence[Any],
    read: Iterable[Tensor],
    num_rows: int | None,
    num_columns: int,
    device: torch.device | None,
) -> Tensor:
    """`ask` without a range in profiles."""
    logits = gate.call_reading(read, arguments)
    checks.check_logits(logits, num_rows, num_columns, device, gate.label)
    return logits


class Gates(nn.ModuleDict):
    """Gates by the number of their cell; a module put in the place of one takes over its name."""

    def __setitem__(self, key: str, module: Callee) -> None:
        title = f"gate {key}"
        module = in_place_of(self._modules.get(key), as_module(module, title))
        super().__setitem__(key, as_branch(module, title, title))


class ConfidenceGate(nn.Module):
    """Stops where a predictor is confident: logits [N, 2], column 0 to stop, column 1 to go on.

    For a `RoutedFusion` of a cheap branch and a costly one, or as a gate of `ChainedFusion`, whose
    column 0 drops a sample too.

    Args:
        predictor: called like the gate; returns class scores [N, C].
        threshold: of the measure.
        measure: "probability": the largest softmax probability, confident from the threshold up.
            "energy": logsumexp of the scores, likewise. "entropy": of the softmax, in nats,
            confident up to the threshold.
    """

    def __init__(self, predictor: Callee, threshold: float, measure: str = "probability") -> None:
        super().__init__()
        if measure not in _MEASURES:
            wanted = ", ".join(map(repr, _MEASURES))
            raise ValueError(f"ConfidenceGate: measure must be one of {wanted}; got {measure!r}")
        self.predictor = as_module(predictor, "ConfidenceGate: predictor")
        self.threshold = threshold
        self.measure = measure

    def forward(self, *inputs: Any) -> Tensor:
        scores = self.predictor(*inputs)
        if self.measure == "probability":
            margin = scores.softmax(1).amax(1) - self.threshold
        elif self.measure == "energy":
            margin = scores.logsumexp(1) - self.threshold
        else:
            logarithms = scores.log_softmax(1)
            finite = logarithms.clamp_min(torch.finfo(scores.dtype).min)  # 0 * log 0 is 0
            margin = self.threshold + (logarithms.exp() * finite).sum(1)
        return torch.stack([margin, -margin], 1)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, measure={self.measure!r}"


def exponential_temperature(
    epoch: int, epochs: int, start: float = 1.0, end: float = 1e-3
) -> float:
    """From `start` in epoch 0 to `end` in epoch `epochs`, by the same factor every epoch.

    Constant before and after.

    DynMM anneals its softmax so, from 1 to 0.001 over 500 epochs:
    `fusion.temperature = exponential_temperature(epoch, 500)`.
    """
    if epochs < 1 or start <= 0 or end <= 0:
        raise ValueError(
            f"exponential_temperature: wanted epochs >= 1 and positive temperatures; got "
            f"epochs={epochs}, start={start}, end={end}"
        )
    return float(start * (end / start) ** (min(max(epoch, 0), epochs) / epochs))
