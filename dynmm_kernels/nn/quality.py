"""The quality of modalities, as losses in training show it (QMF), and the loss that ranks by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # samples whose extremes are kept together


class QualityHistory(nn.Module):
    """The losses of every training sample, added up over its epochs, for each modality.

    The history behind QMF's ranking loss (Zhang et al., ICML 2023), kept on the device. Extremes
    are kept per block of 64 samples, so that a step reads the blocks of its batch, not the data
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
        blocks = -(-num_samples // BLOCK)
        # Column by column, so that the extremes of a block are taken of neighbours.
        self.register_buffer("total", torch.zeros(num_modalities, num_samples).t())
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
        total = self._check(indices, losses, "losses")
        total.index_add_(0, indices, losses.to(total.dtype))
        # The last block shares samples with the one before, so it is always looked at.
        blocks = nn.functional.pad(indices // BLOCK, (0, 1), value=(total.shape[0] - 1) // BLOCK)
        self._look_at(total, blocks)

    @torch.no_grad()
    def quality(self, indices: Tensor) -> Tensor:
        """[n, M] in 0..1: the history, min-max normalised over all samples; large means poor.

        0 where all samples of a modality have the same history, as before the first update.
        """
        above = self._check(indices)[indices] - self.lowest.amin(1)
        return above.div_(self._span())

    def _span(self) -> Tensor:
        """[M], from the least to the largest of all samples; never 0, so that it divides."""
        span = self.highest.amax(1) - self.lowest.amin(1)
        return span.clamp_min_(torch.finfo(span.dtype).tiny)

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> None:
        """Adds what the other processes of `group` recorded since they last did so together."""
        news = (self.total - self.shared).t().contiguous()
        torch.distributed.all_reduce(news, group=group)
        self.total.copy_(self.shared + news.t())
        _take_over(self)

    def _look_at(self, total: Tensor, blocks: Tensor) -> None:
        """Finds the extremes of these blocks again; the last one ends with the last sample."""
        size = total.shape[0]
        length = min(BLOCK, size)
        starts = (blocks * BLOCK).clamp_(max=size - length)
        values = total.t().unfold(1, length, 1)[:, starts]
        self.lowest.index_copy_(1, blocks, values.amin(2))
        self.highest.index_copy_(1, blocks, values.amax(2))

    def _check(self, indices: Tensor, values: Tensor | None = None, name: str = "") -> Tensor:
        """`total`, if all of this fits it."""
        total = self.total
        size, modalities = total.shape
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
            raise TypeError(f"QualityHistory: indices must be int64 [n]; got {_told(indices)}")
        if indices.device != total.device:
            raise ValueError(
                f"QualityHistory: indices must be on {total.device}, as the history is; got "
                f"{indices.device}"
            )
        if values is not None and (
            not isinstance(values, Tensor)
            or values.shape != (len(indices), modalities)
            or values.device != total.device
        ):
            raise ValueError(
                f"QualityHistory: {name} must be [n, M] = [{len(indices)}, {modalities}] on "
                f"{total.device}; got {_told(values)}"
            )
        message = f"QualityHistory: indices must be in 0..{size - 1}"
        if indices.is_cuda:
            torch._assert_async(((indices >= 0) & (indices < size)).all(), message)
        elif len(indices):
            lowest, highest = (extreme.item() for extreme in indices.aminmax())
            if lowest < 0 or highest >= size:
                raise ValueError(f"{message}; got {lowest if lowest < 0 else highest}")
        return total


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
    total = history._check(indices, confidence, "confidence")[indices]
    gap = (total - total.roll(-1, 0)).div_(history._span())  # of qualities: their offset cancels
    order, gap = gap.sign().to(confidence.dtype), gap.to(confidence.dtype)
    excess = order * (confidence - confidence.roll(-1, 0) - gap)
    return excess.clamp_min(0).sum(0) / max(1, len(indices))


def _take_over(history: QualityHistory, _: Any = None) -> None:
    """What is in `total` now, every process has."""
    history.shared.copy_(history.total)
    total, blocks = history.total, history.lowest.shape[1]
    history._look_at(total, torch.arange(blocks, device=total.device))


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__
