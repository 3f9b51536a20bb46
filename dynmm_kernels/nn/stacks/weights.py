"""The weights of a cell, out of those of depths or of keeping."""

from __future__ import annotations

import torch
from torch import Tensor


def skip_and_fuse(weights: Tensor, k: int) -> Tensor:
    """[N, 2]: out of the weights [N, 1 + L] of all depths, those of the ones before k and after."""
    return torch.stack([weights[:, :k].sum(1), weights[:, k:].sum(1)], 1)


def hide_unselected(pair: Tensor) -> Tensor:
    """The same values; only the weights that are not zero keep their gradient."""
    return torch.where(pair.detach() == 0, 0, pair)


def skip_or_fuse(keep: Tensor) -> Tensor:
    """[N, 2], of skipping and of fusing."""
    return torch.stack([1 - keep, keep], 1)


def padded(keep: Tensor, size: int) -> Tensor:
    """Zeros for the samples that are through."""
    return keep if len(keep) == size else torch.cat([keep, keep.new_zeros(size - len(keep))])
