"""What a cascade did with a batch, and the loss that trains all of its exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...functional.deferred import has_values
from ..routing import Routing


@dataclass(frozen=True, eq=False)
class CascadeRouting(Routing):
    """Where the samples of one output of `CascadeFusion` left.

    As in `Routing`, with exits for branches, and:

    Attributes:
        choice: int64 [N], the stage after which each sample left.
        plan: sorted by exit.
        rows_run: samples that each stage processed: those that no stage before it let go; all N in
            training and in masked execution.
        costs: cost per sample of each stage, or None where a stage has none.
        exits: where all stages ran on all samples (in training and masked execution), the fused
            logits [N, C] after every stage, with their graph; else None.
    """

    exits: tuple[Tensor, ...] | None = None

    @property
    def weights(self) -> Tensor:
        """float [N, S]: one for each stage that a sample came to, else zero. No gradient."""
        assert self.choice is not None
        stages = torch.arange(len(self.rows_run), device=self.choice.device)
        return (self.choice.unsqueeze(1) >= stages).float()


def deep_supervision_loss(
    routing: CascadeRouting, targets: Tensor, weights: Sequence[float] | None = None
) -> Tensor:
    """The losses of all exits, added up: sum_s weights[s] * loss(exits[s], targets).

    As early-exit networks are trained: BranchyNet (Teerapittayanon et al., 2016) with weights,
    MSDNet (Huang et al., 2018) with ones. A sum, not a mean.

    Args:
        routing: from `cascade(..., return_routing=True)` in training.
        targets: int64 [N] in 0..C-1: the mean over samples of the cross entropy. Floating [N, C] in
            0..1, for several labels: the mean over samples and classes of the binary cross entropy
            with logits.
        weights: one number >= 0 per exit; default: ones.

    Returns:
        A scalar in fp32 or wider; 0 for an empty batch.

    Raises:
        ValueError: a routing without exits, another number of weights, targets that do not fit.
        TypeError: what is no `CascadeRouting`; targets of another dtype.
    """
    if not isinstance(routing, CascadeRouting):
        raise TypeError(
            "deep_supervision_loss: wanted a CascadeRouting, from cascade(..., "
            f"return_routing=True); got {type(routing).__name__}"
        )
    exits = routing.exits
    if exits is None:
        raise ValueError(
            "deep_supervision_loss: the routing has no exits: its stages ran on survivors only; "
            "call cascade.train() first"
        )
    weights = [1.0] * len(exits) if weights is None else [*weights]
    if len(weights) != len(exits) or not all(weight >= 0 for weight in weights):
        raise ValueError(
            f"deep_supervision_loss: weights must be {len(exits)} numbers >= 0, one per exit; got "
            f"{weights}"
        )
    _check_targets(targets, exits[0])
    dtype = torch.promote_types(exits[0].dtype, torch.float32)
    losses = [
        weight * _loss(logits.to(dtype), targets)
        for weight, logits in zip(weights, exits, strict=True)
    ]
    return torch.stack(losses).sum()


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        total = F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="sum")
        return total / max(1, logits.numel())
    return F.cross_entropy(logits, targets, reduction="sum") / max(1, logits.shape[0])


def _check_targets(targets: Tensor, logits: Tensor) -> None:
    rows, classes = logits.shape

    def wanted() -> str:  # called for messages alone: text would tie a traced graph to its rows
        return (
            f"deep_supervision_loss: targets must be int64 [{rows}] or floating [{rows}, {classes}]"
        )

    if not isinstance(targets, Tensor):
        raise TypeError(f"{wanted()}; got {type(targets).__name__}")
    if not targets.is_floating_point() and targets.dtype != torch.int64:
        raise TypeError(f"{wanted()}; got {targets.dtype}")
    shape = [rows, classes] if targets.is_floating_point() else [rows]
    if list(targets.shape) != shape or targets.device != logits.device:
        raise ValueError(
            f"{wanted()} on {logits.device}; got {targets.dtype} {list(targets.shape)} on "
            f"{targets.device}"
        )
    # On a GPU the answer would have to be waited for.
    if targets.is_cpu and has_values(targets) and rows:
        low, high = (bound.item() for bound in targets.aminmax())
        top = 1 if targets.is_floating_point() else classes - 1
        if not 0 <= low <= high <= top:
            raise ValueError(
                f"deep_supervision_loss: targets must be in 0..{top}; got {low}..{high}"
            )
