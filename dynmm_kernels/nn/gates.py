"""From logits to decisions: gate noise, hard weights and their straight-through gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_like(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits).

    Drawn in fp32 at least, so that a half-precision uniform never rounds to 0 or 1.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    exponential = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    return -exponential.exponential_(generator=generator).log_().to(logits.dtype)


def one_hot(choice: Tensor, num_branches: int, dtype: torch.dtype) -> Tensor:
    """[N, B]: one in the chosen column; a row of zeros where the choice is -1."""
    columns = torch.arange(num_branches, device=choice.device)
    return (choice.unsqueeze(1) == columns).to(dtype)


def straight_through(choice: Tensor, probs: Tensor) -> Tensor:
    """[N, B]: exactly one-hot, with the gradient of `probs` (DynMM's hard gate).

    onehot - stopgrad(p) + p evaluates to exactly 0 and 1 in this order of operations.
    """
    return one_hot(choice, probs.shape[1], probs.dtype) - probs.detach() + probs
