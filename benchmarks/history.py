"""QMF's history of losses and its ranking loss, against NumPy arrays on the host.

The rival does as the published code does: it keeps the history of each modality in an array on the
host, and normalises the two samples of every pair by extremes that it looks for, both times, in the
whole data set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import Contest, Outcome, Row
from benchmarks.reference import TOLERANCE, disagreement
from dynmm_kernels import QualityHistory, quality_rank_loss

ROWS = ("dynmm_kernels", "numpy")
OURS = ROWS[:1]
BATCHES = 64  # different ones in turn, so that not all of the history is at hand in the caches


class Batch(NamedTuple):
    indices: Tensor
    losses: Tensor
    confidence: Tensor


class NumpyHistory:
    """One array per modality; losses go to the host, and the order of pairs comes back."""

    def __init__(self, total: Tensor):
        self.totals = [column.double().numpy().copy() for column in total.cpu().unbind(1)]

    def update(self, indices: Tensor, losses: Tensor) -> None:
        rows = indices.cpu().numpy()
        for m, total in enumerate(self.totals):
            total[rows] += losses[:, m].cpu().numpy()

    def quality(self, m: int, indices: Tensor) -> np.ndarray:
        total = self.totals[m]
        low, high = total.min(), total.max()
        return (total[indices.cpu().numpy()] - low) / (high - low)

    def rank_loss(self, confidence: Tensor, indices: Tensor) -> Tensor:
        """[M]"""
        losses = []
        for m, own in enumerate(confidence.unbind(1)):
            gap = self.quality(m, indices) - self.quality(m, indices.roll(-1))
            order, margin = (torch.from_numpy(x).to(own) for x in (np.sign(gap), np.abs(gap)))
            losses.append((order * (own - own.roll(-1)) - margin).clamp_min(0).mean())
        return torch.stack(losses)


@dataclass(frozen=True)
class HistorySetting:
    num_samples: int
    """Of the data set."""
    n: int = 128
    modalities: int = 2
    device: str = "cpu"

    def __str__(self) -> str:
        return f"quality history of {self.num_samples}, N={self.n}"

    def gains(self, outcome: Outcome, row: str) -> dict[str, float | None]:
        return {
            "ours_us": 1e6 * outcome.median(row),
            "numpy_us": 1e6 * outcome.median("numpy"),
            "numpy_over_ours": outcome.ratio("numpy", row),
        }

    def info(self, outcome: Outcome, row: str) -> dict[str, Any]:
        """What goes beside the times of one row."""
        info = {"row": row, "error": outcome.errors[row], "threads": torch.get_num_threads()}
        return {**info, **self.gains(outcome, row)} if row in OURS else info


def batches(setting: HistorySetting) -> list[Batch]:
    """An index stands in a batch once: += of NumPy would count it once if it came twice."""
    generator = torch.Generator().manual_seed(0)
    made, shape = [], (setting.n, setting.modalities)
    for _ in range(BATCHES):
        indices = torch.randperm(setting.num_samples, generator=generator)[: setting.n]
        losses, confidence = (torch.rand(shape, generator=generator) for _ in range(2))
        batch = Batch(indices, 3 * losses, confidence)
        made.append(Batch(*(x.to(setting.device) for x in batch)))
        made[-1].confidence.requires_grad_()
    return made


def contest(setting: HistorySetting) -> Contest:
    """A step: the losses are recorded, then the ranking loss is computed, with its graph."""
    generator = torch.Generator().manual_seed(1)
    total = 10 * torch.rand(setting.num_samples, setting.modalities, generator=generator)
    history = QualityHistory(setting.num_samples, setting.modalities).to(setting.device)
    history.load_state_dict({"total": total})
    rival = NumpyHistory(total)
    known = batches(setting)

    def ours(batch: Batch) -> Tensor:
        history.update(batch.indices, batch.losses)
        return quality_rank_loss(batch.confidence, batch.indices, history).sum()

    def theirs(batch: Batch) -> Tensor:
        rival.update(batch.indices, batch.losses)
        return rival.rank_loss(batch.confidence, batch.indices).sum()

    steps = dict(zip(ROWS, (ours, theirs), strict=True))
    error = max(disagreement(*(outcome(step, batch) for step in steps.values())) for batch in known)
    rows = {name: Row(in_turn(step, cycle(known))) for name, step in steps.items()}
    return Contest(rows, dict.fromkeys(ROWS, error), TOLERANCE[torch.float32], setting.device)


def outcome(step: Callable[[Batch], Tensor], batch: Batch) -> list[Tensor]:
    """The loss and the gradient of the confidences."""
    loss = step(batch)
    return [loss.detach(), *torch.autograd.grad(loss, batch.confidence)]


def in_turn(step: Callable[[Batch], Tensor], batches: Iterator[Batch]) -> Callable[[], Tensor]:
    return lambda: step(next(batches))
