"""What is decided for a batch, by a gate or by force, and what it does to the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import movement, selecting, tree
from ..functional.movement import carries_gradient
from ..functional.plan import RoutingPlan
from .rules import TOP_ONE, UNIFORM, Rule


@dataclass(slots=True)
class Decision:
    """What was decided for a batch, by a gate or by force; for branches or for depths.

    Attributes:
        rule: what made the choice out of logits.
        choice: int64 [N], the branch or depth of each sample (-1: none); as its rule says; None
            where all branches run, weighted by `probs`.
        plan: the choice, sorted; None where nobody sorts.
        probs: [N, B], of the gate, with its graph; None where the choice was forced.
        rank_weights: [N, k], of the ranks of the plan, where they are not ones.
        grad: how the gate learns from weights that are ones: "straight_through" or "selected";
            None: it does not.
    """

    rule: Rule
    choice: Tensor | None = None
    plan: RoutingPlan | None = None
    probs: Tensor | None = None
    rank_weights: Tensor | None = None
    grad: str | None = None

    @property
    def num_rows(self) -> int:
        """N."""
        decided = self.probs if self.choice is None else self.choice
        assert decided is not None  # without a choice they are all there is
        return decided.shape[0]

    @property
    def soft(self) -> bool:
        """Whether outputs are multiplied by what need not be 0 or 1."""
        return self.choice is None or self.rank_weights is not None

    @property
    def exact(self) -> bool:
        """Whether the gate learns what it would learn in masked execution."""
        return self.grad == "straight_through"

    @property
    def selected(self) -> Tensor:
        """bool [N, B], of a hard choice."""
        assert self.choice is not None
        assert self.plan is not None
        return self.rule.selected(self.choice, self.plan.num_branches)

    @property
    def chosen(self) -> Tensor | None:
        """bool [B]: the branches that somebody chose; None: all."""
        return None if self.choice is None else self.selected.any(0)

    def weights(self) -> Tensor:
        """[N, B]: what multiplies the branches, with all of the gate's gradient."""
        if self.choice is None:
            assert self.probs is not None  # without a choice they are all there is
            return self.probs
        if self.probs is None:
            return self.selected.float()
        return self.rule.weights(self.choice, self.probs)

    def multipliers(self) -> Tensor:
        """`weights` with the gradient that the gate is to get: what masked execution uses."""
        if self.choice is None:
            return self.weights()
        if self.rank_weights is not None:
            zeros = self.rank_weights.new_zeros(self.choice.shape[0], self.probs.shape[1])  # type: ignore[union-attr]
            return zeros.scatter(1, self.choice, self.rank_weights)
        if self.grad is None:
            return self.selected.to(torch.float32 if self.probs is None else self.probs.dtype)
        weights = self.weights()
        return weights if self.exact else torch.where(self.selected, weights, 0)

    def blend(self, column: Sequence[Any], multipliers: Tensor) -> Any:
        """The weighted sum of one leaf of every branch; the plain one of auxiliary losses."""
        if tree.is_scalar(column[0]):
            return sum_losses(column, self.chosen)
        return blend(column, self.fitting(multipliers, column), self.soft, self.rule)

    def fitting(self, multipliers: Tensor, column: Sequence[Any]) -> Tensor:
        """The multipliers, where all are equal as precise as the outputs are."""
        return _equal_weights(multipliers, column) if self.rule is UNIFORM else multipliers


def uniform(num_rows: int, num_columns: int, like: Tensor) -> Decision:
    """Every branch, or every depth, equally; as precise as `like`, in fp32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return Decision(
        UNIFORM, probs=like.new_full((num_rows, num_columns), 1 / num_columns, dtype=dtype)
    )


def blend(column: Sequence[Any], weights: Tensor, soft: bool, rule: Rule = TOP_ONE) -> Any:
    """sum_b weights[:, b] * column[b], in the widest dtype of the branches.

    soft: the weights need not be 0 and 1, so only floating tensors can be blended.
    """
    first = column[0]
    if not isinstance(first, Tensor):
        return first
    if not carries_gradient(first):
        if soft:
            raise TypeError(
                f"an output of {first.dtype} cannot be weighted; return floating tensors, or let "
                "one branch be chosen: masked or routed execution, select=1"
            )
        return rule.merge(column, weights != 0)
    weight, *others = selecting.columns(weights, first)
    total = weight * first
    for weight, output in zip(others, column[1:], strict=True):
        total = total + weight * output
    return total.to(movement.widest_dtype(column))


def sum_losses(losses: Sequence[Tensor], chosen: Tensor | None = None) -> Tensor:
    """The sum of auxiliary losses, in memory of its own; `chosen`: bool [B]; None: all."""
    column = torch.stack([*movement.same_dtype(losses)])
    return (column if chosen is None else torch.where(chosen, column, 0)).sum()


def _equal_weights(like: Tensor, column: Sequence[Any]) -> Tensor:
    """[N, B], 1 / B each, as precise as the outputs are."""
    dtypes = [leaf.dtype for leaf in column if carries_gradient(leaf)]
    wide = torch.float64 in dtypes or torch.complex128 in dtypes
    dtype = torch.float64 if wide else torch.float32
    return like.new_full(like.shape, 1 / like.shape[1], dtype=dtype)


def forced(
    choice: Any,
    name: str,
    num_choices: int,
    num_rows: int | None,
    device: torch.device | None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, list[int] | None]:
    """A forced decision, called `name` in messages, as int64 [N]; values of a tensor unchecked.

    Args:
        choice: an int in 0..num_choices-1, the same for all samples; an integer tensor [N]; or
            "random": all choices equally likely, drawn with `generator`.
        num_rows: N; None where the inputs do not tell.

    Returns:
        It, and how many samples have each choice; None where the host does not know.

    Raises:
        ValueError: out of range, another shape or another device. TypeError: anything else.
    """
    if isinstance(choice, int) and not isinstance(choice, bool):
        if not 0 <= choice < num_choices:
            raise ValueError(
                f"{name} must be in 0..{num_choices - 1} (or a LongTensor [N]); got {choice}"
            )
        if num_rows is None:
            raise ValueError(f"{name}: the inputs hold no tensor, so give a LongTensor [N]")
        counts = [num_rows if c == choice else 0 for c in range(num_choices)]
        return torch.full((num_rows,), choice, device=device), counts
    if isinstance(choice, str) and choice == "random":
        if num_rows is None:
            raise ValueError(f"{name}: the inputs hold no tensor, so give a LongTensor [N]")
        place = device or torch.device("cpu")
        chosen = drawn(num_choices, (num_rows,), place, generator)
        known = chosen.bincount(minlength=num_choices).tolist() if chosen.is_cpu else None
        return upload(chosen, place), known
    if not isinstance(choice, Tensor) or choice.dtype not in (torch.int64, torch.int32):
        got = choice.dtype if isinstance(choice, Tensor) else type(choice).__name__
        raise TypeError(
            f"{name} must be an int or a LongTensor [N], or 'random' or 'uniform'; got "
            f"{choice if isinstance(choice, str) else got!r}"
        )
    _check_device(choice, name, device)
    if choice.ndim != 1 or num_rows not in (None, choice.shape[0]):
        size = "N" if num_rows is None else num_rows
        raise ValueError(f"{name} must have shape [{size}]; got {list(choice.shape)}")
    return choice.long(), None


def drawn(
    num_choices: int, shape: Sequence[int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """int64, each choice equally likely; on the host, so that nobody waits for the counts.

    On the device only with a generator there, or where a capture would replay the host's draw.
    """
    there = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    there = there or (generator is not None and generator.device.type == device.type)
    place = device if there else torch.device("cpu")
    return torch.randint(num_choices, shape, generator=generator, device=place)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """It on the device, without a wait."""
    if tensor.is_cpu and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def forced_mask(
    choice: Tensor, name: str, num_choices: int, num_rows: int | None, device: torch.device | None
) -> Tensor:
    """A forced decision, bool [N, B], after checking that it is one of N samples."""
    _check_device(choice, name, device)
    rows = len(choice) if num_rows is None else num_rows
    if list(choice.shape) != [rows, num_choices]:
        raise ValueError(
            f"{name} must have shape [N, B] = {[rows, num_choices]} where it is bool; got "
            f"{list(choice.shape)}"
        )
    return choice


def _check_device(choice: Tensor, name: str, device: torch.device | None) -> None:
    if device is not None and choice.device != device:
        raise ValueError(f"{name} must be on {device}, as the inputs are; got {choice.device}")
