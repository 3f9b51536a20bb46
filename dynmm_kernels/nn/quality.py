"""The quality of modalities, as losses in training show it (QMF), and the loss that ranks by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 128  # samples whose extremes are kept together


class QualityHistory(nn.Module):
    """The losses of every training sample, added up over its epochs, for each modality.

    The history behind QMF's ranking loss (Zhang et al., ICML 2023), kept on the device. Extremes
    are kept per block of 128 samples, so that a step reads the blocks of its batch, not the data
    set. In distributed training every process sees samples of its own; `all_reduce` once per epoch
    gives all of them the whole history.

    Args:
        num_samples: of the training set; indices are 0..num_samples-1.
        num_modalities: M.

    Attributes:
        total: [num_samples, M], the buffer that `state_dict` carries.
    """

    total: Tensor
    lowest: Tensor
    highest: Tensor
    shared: Tensor

    def __init__(self, num_samples: int, num_modalities: int) -> None:
        super().__init__()
        for name, value in (("num_samples", num_samples), ("num_modalities", num_modalities)):
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"QualityHistory: {name} must be a positive integer; got {value!r}"
                )
        blocks = num_samples // BLOCK + 1  # the last holds the rest, which may be empty
        self.register_buffer("total", torch.zeros(num_samples, num_modalities))
        self.register_buffer("lowest", torch.zeros(num_modalities, blocks), persistent=False)
        self.register_buffer("highest", torch.zeros(num_modalities, blocks), persistent=False)
        self.register_buffer("shared", torch.zeros_like(self.total), persistent=False)
        self.register_load_state_dict_post_hook(_take_over)

    def extra_repr(self) -> str:
        samples, modalities = self.total.shape
        return f"num_samples={samples}, num_modalities={modalities}"

    @torch.no_grad()
    def update(self, indices: Tensor, losses: Tensor) -> None:
        """Adds the losses of a batch; waits for nothing.

        Args:
            indices: int64 [n]. The losses of an index that comes twice are both added; the
                published code, which indexes a NumPy array with +=, keeps one of them.
            losses: [n, M], per sample.

        Raises:
            ValueError, TypeError: what does not fit; an index out of range, on a GPU at the next
                synchronisation.
        """
        self._check(indices, losses, "losses")
        self.total.index_add_(0, indices, losses.to(self.total.dtype))
        self._look_at(indices // BLOCK)

    @torch.no_grad()
    def quality(self, indices: Tensor) -> Tensor:
        """[n, M] in 0..1: the history, min-max normalised over all samples; large means poor.

        0 where all samples of a modality have the same history, as before the first update.
        """
        self._check(indices)
        return self._quality(indices)

    def _quality(self, indices: Tensor) -> Tensor:
        low, high = self.lowest.amin(1), self.highest.amax(1)
        span = high - low
        return (self.total.index_select(0, indices) - low) / torch.where(span > 0, span, torch.inf)

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> None:
        """Adds what the other processes of `group` recorded since they last did so together."""
        news = self.total - self.shared
        torch.distributed.all_reduce(news, group=group)
        self.total.copy_(self.shared + news)
        _take_over(self)

    def _look_at(self, blocks: Tensor) -> None:
        """Finds the extremes of these blocks again, and of the rest behind the last full one."""
        (size, modalities), last = self.total.shape, self.lowest.shape[1] - 1
        if last:
            full = self.total[: last * BLOCK].view(last, BLOCK * modalities)
            blocks = blocks.clamp(max=last - 1)
            values = full.index_select(0, blocks).view(-1, BLOCK, modalities)
            low, high = values.aminmax(dim=1)
            self.lowest.index_copy_(1, blocks, low.t())
            self.highest.index_copy_(1, blocks, high.t())
        # An empty rest repeats the last sample.
        rest = self.total[min(last * BLOCK, size - 1) :]
        self.lowest[:, last], self.highest[:, last] = rest.aminmax(dim=0)

    def _check(self, indices: Tensor, values: Tensor | None = None, name: str = "") -> None:
        size, modalities = self.total.shape
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
            raise TypeError(f"QualityHistory: indices must be int64 [n]; got {_told(indices)}")
        if indices.device != self.total.device:
            raise ValueError(
                f"QualityHistory: indices must be on {self.total.device}, as the history is; got "
                f"{indices.device}"
            )
        if values is not None and (
            not isinstance(values, Tensor)
            or values.shape != (len(indices), modalities)
            or values.device != self.total.device
        ):
            raise ValueError(
                f"QualityHistory: {name} must be [n, M] = [{len(indices)}, {modalities}] on "
                f"{self.total.device}; got {_told(values)}"
            )
        message = f"QualityHistory: indices must be in 0..{size - 1}"
        if indices.is_cuda:
            torch._assert_async(((indices >= 0) & (indices < size)).all(), message)
        elif len(indices):
            lowest, highest = (extreme.item() for extreme in indices.aminmax())
            if lowest < 0 or highest >= size:
                raise ValueError(f"{message}; got {lowest if lowest < 0 else highest}")


def quality_rank_loss(confidence: Tensor, indices: Tensor, history: QualityHistory) -> Tensor:
    """How far confidences are from the order in which the history ranks the samples.

    Every sample is paired with the next one of the batch, the last with the first. With c their
    confidences and q their qualities, t = sign(q_1 - q_2):

        mean over pairs of max(0, t * (c_1 - c_2) - |q_1 - q_2|)

    as the published code of QMF has it, whose margin counts for the confidences, not against them.
    Call it before `history.update` (its RGB-D code) or after (its text-image code).

    Args:
        confidence: [n, M], as `energy_fuse` returns it, with its graph.
        indices: int64 [n], of the batch's samples.

    Returns:
        [M], one loss per modality, to be summed and weighted. 0 for an empty batch.
    """
    history._check(indices, confidence, "confidence")
    quality = history._quality(indices)
    gap = quality - quality.roll(-1, 0)
    order = gap.sign().to(confidence.dtype)
    excess = order * (confidence - confidence.roll(-1, 0)) - gap.abs().to(confidence.dtype)
    return excess.clamp_min(0).sum(0) / max(1, len(indices))


def _take_over(history: QualityHistory, _: Any = None) -> None:
    """What is in `total` now, every process has."""
    history.shared.copy_(history.total)
    history._look_at(torch.arange(history.lowest.shape[1], device=history.total.device))


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__
