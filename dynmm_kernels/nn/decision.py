"""From logits to decisions: gate noise, which branches a sample takes, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import checks, movement, sorting
from ..functional.plan import RoutingPlan


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


def tempered_softmax(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) over columns; a small temperature overflows no fp16."""
    if logits.dtype == torch.float16:
        logits = logits - logits.detach().amax(1, keepdim=True)
    return (logits / temperature).softmax(1)


class TopOne:
    """The branch with the largest logit (ties: the first), with weight one: DynMM's hard gate."""

    def decide(self, logits: Tensor) -> tuple[Tensor, RoutingPlan]:
        """The choice int64 [N] and its plan; the check of the logits rides on the counts."""
        choice, plan = sorting.route_argmax(logits.detach() if logits.requires_grad else logits)
        checks.check_faults(logits, plan.host_header)
        return choice, plan

    def noise(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """[N, B]: added to the logits, it makes the decision a draw."""
        return gumbel_like(logits, generator)

    def probs(self, logits: Tensor, temperature: float) -> Tensor:
        """[N, B]: the weights of dense execution, and what the gate's gradient goes through."""
        return tempered_softmax(logits, temperature)

    def selected(self, choice: Tensor, num_branches: int) -> Tensor:
        """bool [N, B]."""
        return choice.unsqueeze(1) == torch.arange(num_branches, device=choice.device)

    def weights(self, choice: Tensor, probs: Tensor) -> Tensor:
        """[N, B]: zeros and ones, with the gradient of `probs`."""
        return straight_through(choice, probs)

    def soft_weights(self, choice: Tensor, probs: Tensor) -> Tensor | None:
        """[N, k]: what multiplies the rows of a plan of k ranks; None: ones."""
        return None


class TopK(TopOne):
    """The k branches of the largest logits, weighted by the softmax over these k.

    That is the mixture of experts of Shazeer et al. (2017): what is not among the k has weight 0
    and gets no gradient in masked execution, either.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def decide(self, logits: Tensor) -> tuple[Tensor, RoutingPlan]:
        """The choice int64 [N, k], the most probable first."""
        values, choice = logits.detach().topk(self.k, dim=1)
        undefined = ~values[:, :1].isfinite() | logits.isnan().any(1, keepdim=True)
        plan = sorting.route_unless(choice, undefined, logits.shape[1])
        checks.check_faults(logits, plan.host_header, entries_per_row=self.k)
        return choice, plan

    def weights(self, choice: Tensor, probs: Tensor) -> Tensor:
        return torch.zeros_like(probs).scatter(1, choice, self.soft_weights(choice, probs))

    def soft_weights(self, choice: Tensor, probs: Tensor) -> Tensor:
        chosen = probs.gather(1, choice)
        return chosen / chosen.sum(1, keepdim=True)


class MultiHot(TopOne):
    """Every branch by itself: taken, with weight one, where its logit is positive (AdaMML).

    The gradient goes through the sigmoid. A sample may take several branches, which are summed,
    or none.
    """

    def decide(self, logits: Tensor) -> tuple[Tensor, RoutingPlan]:
        """The choice bool [N, B]."""
        num_branches = logits.shape[1]
        choice = logits.detach() > 0
        entries = torch.where(choice, torch.arange(num_branches, device=choice.device), -1)
        plan = sorting.route_unless(entries, logits.isnan().any(1, keepdim=True), num_branches)
        checks.check_faults(logits, plan.host_header, entries_per_row=num_branches)
        return choice, plan

    def noise(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        return gumbel_like(logits, generator) - gumbel_like(logits, generator)

    def probs(self, logits: Tensor, temperature: float) -> Tensor:
        return (logits / temperature).sigmoid()

    def selected(self, choice: Tensor, num_branches: int) -> Tensor:
        return choice

    def weights(self, choice: Tensor, probs: Tensor) -> Tensor:
        return choice.to(probs.dtype) - probs.detach() + probs


def selection_of(select: int | str) -> TopOne:
    """The rule that `RoutedFusion(select=...)` names."""
    if select == "multi_hot":
        return MultiHot()
    return TopOne() if select == 1 else TopK(int(select))


def forced(
    choice: Any,
    name: str,
    num_choices: int,
    num_rows: int | None,
    device: torch.device | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A forced decision, called `name` in messages, as int64 [N]; values of a tensor unchecked.

    Args:
        choice: an int in 0..num_choices-1, the same for all samples; an integer tensor [N]; or
            "random": all choices equally likely, drawn with `generator`.
        num_rows: N; None where the inputs do not tell.

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
        return torch.full((num_rows,), choice, device=device)
    if isinstance(choice, str) and choice == "random":
        if num_rows is None:
            raise ValueError(f"{name}: the inputs hold no tensor, so give a LongTensor [N]")
        return torch.randint(num_choices, (num_rows,), generator=generator, device=device)
    if not isinstance(choice, Tensor) or choice.dtype not in (torch.int64, torch.int32):
        got = choice.dtype if isinstance(choice, Tensor) else type(choice).__name__
        raise TypeError(
            f"{name} must be an int or a LongTensor [N], or 'random' or 'uniform'; got "
            f"{choice if isinstance(choice, str) else got!r}"
        )
    if device is not None and choice.device != device:
        raise ValueError(f"{name} must be on {device}, as the inputs are; got {choice.device}")
    if choice.ndim != 1 or num_rows not in (None, choice.shape[0]):
        size = "N" if num_rows is None else num_rows
        raise ValueError(f"{name} must have shape [{size}]; got {list(choice.shape)}")
    return choice.long()


def blend(column: Sequence[Any], weights: Tensor, soft: bool, several: bool = False) -> Any:
    """sum_b weights[:, b] * column[b], in the widest dtype of the branches."""
    first = column[0]
    if not isinstance(first, Tensor):
        return first
    shape = (-1, *[1] * (first.ndim - 1))
    if first.is_floating_point() or first.is_complex():
        total = weights[:, 0].view(shape) * first
        for b, output in enumerate(column[1:], start=1):
            total = total + weights[:, b].view(shape) * output
        return total.to(movement.widest_dtype(column))
    if soft:
        raise TypeError(
            f"an output of {first.dtype} cannot be weighted; return floating tensors, or let one "
            "branch be chosen: masked or routed execution, select=1"
        )
    if several and first.dtype == torch.bool:
        raise TypeError("bool outputs of several branches cannot be summed; return integers")
    total = torch.zeros_like(first)
    for b, output in enumerate(column):
        chosen = weights[:, b].view(shape) != 0
        own = torch.where(chosen, output, torch.zeros_like(output))
        total = total + own if several else torch.where(chosen, output, total)
    return total
