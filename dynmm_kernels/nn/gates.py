"""From logits to decisions: gate noise, hard weights and their straight-through gradient."""

from __future__ import annotations

from typing import Any

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


def forced(
    choice: Any, name: str, num_choices: int, num_rows: int | None, device: torch.device | None
) -> Tensor:
    """A forced decision, called `name` in messages, as int64 [N]; values of a tensor unchecked.

    Args:
        choice: an int in 0..num_choices-1, the same for all samples; or an integer tensor [N].
        num_rows: N; None where the inputs do not tell.

    Raises:
        ValueError: out of range, or another shape. TypeError: anything else.
    """
    if isinstance(choice, int) and not isinstance(choice, bool):
        if not 0 <= choice < num_choices:
            raise ValueError(
                f"{name} must be in 0..{num_choices - 1} (or a LongTensor [N]); got {choice}"
            )
        if num_rows is None:
            raise ValueError(f"{name}: the inputs hold no tensor, so give a LongTensor [N]")
        return torch.full((num_rows,), choice, device=device)
    if not isinstance(choice, Tensor) or choice.dtype not in (torch.int64, torch.int32):
        got = choice.dtype if isinstance(choice, Tensor) else type(choice).__name__
        raise TypeError(f"{name} must be an int or a LongTensor [N]; got {got}")
    if choice.ndim != 1 or num_rows not in (None, choice.shape[0]):
        size = "N" if num_rows is None else num_rows
        raise ValueError(f"{name} must have shape [{size}]; got {list(choice.shape)}")
    return choice.long()
