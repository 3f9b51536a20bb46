"""What is decided for a batch: the rules from logits to choices, forced choices, and the record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import checks, movement, sorting
from ..functional.movement import carries_gradient
from ..functional.plan import RoutingPlan


class Selection:
    """A rule: which branches a sample takes, by its logits, and with what weights."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def undefined(self, logits: Tensor) -> Tensor:
        """bool [N]: rows that decide nothing, a nan or no finite maximum."""
        return ~logits.amax(1).isfinite()

    def decide(self, logits: Tensor) -> tuple[Tensor, RoutingPlan]:
        """The choice and its plan; the check of the logits rides on the counts."""
        raise NotImplementedError

    def noise(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """[N, B]: added to the logits, it makes the decision a draw."""
        return gumbel_like(logits, generator)

    def probs(self, logits: Tensor, temperature: float) -> Tensor:
        """[N, B]: the weights of dense execution, and what the gate's gradient goes through."""
        return tempered_softmax(logits, temperature)

    def selected(self, choice: Tensor, num_branches: int) -> Tensor:
        """bool [N, B]."""
        return one_hot(choice, num_branches)

    def weights(self, choice: Tensor, probs: Tensor) -> Tensor:
        """[N, B]: zeros and ones, with the gradient of `probs`."""
        return straight_through(self.selected(choice, probs.shape[1]), probs)

    def rank_weights(self, choice: Tensor, probs: Tensor) -> Tensor | None:
        """[N, k]: what multiplies the rows of a plan of k ranks; None: ones."""
        return None

    def merge(self, column: Sequence[Tensor], chosen: Tensor) -> Tensor:
        """Outputs without gradients where they were chosen, bool [N, B]; zeros for nobody's."""
        total = torch.zeros_like(column[0])
        for b, output in enumerate(column):
            total = torch.where(_like(chosen[:, b], output), output, total)
        return total


class TopOne(Selection):
    """The branch with the largest logit (ties: the first), with weight one: DynMM's hard gate."""

    def decide(self, logits: Tensor) -> tuple[Tensor, RoutingPlan]:
        """The choice int64 [N]."""
        choice, plan = sorting.route_argmax(logits.detach() if logits.requires_grad else logits)
        checks.check_faults(logits, plan.host_header)
        return choice, plan


class TopK(Selection):
    """The k branches of the largest logits, weighted by the softmax over these k.

    That is the mixture of experts of Shazeer et al. (2017): what is not among the k has weight 0
    and gets no gradient in masked execution, either.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def decide(self, logits: Tensor) -> tuple[Tensor, RoutingPlan]:
        """The choice int64 [N, k], the most probable first."""
        choice = logits.detach().topk(self.k, dim=1).indices
        plan = sorting.route_unless(choice, self.undefined(logits), logits.shape[1])
        checks.check_faults(logits, plan.host_header, entries_per_row=self.k)
        return choice, plan

    def weights(self, choice: Tensor, probs: Tensor) -> Tensor:
        return torch.zeros_like(probs).scatter(1, choice, self.rank_weights(choice, probs))

    def rank_weights(self, choice: Tensor, probs: Tensor) -> Tensor:
        chosen = probs.gather(1, choice)
        return chosen / chosen.sum(1, keepdim=True)


class MultiHot(Selection):
    """Every branch by itself: taken, with weight one, where its logit is positive (AdaMML).

    The gradient goes through the sigmoid. A sample may take several branches, which are summed,
    or none.
    """

    def undefined(self, logits: Tensor) -> Tensor:
        return logits.isnan().any(1)

    def decide(self, logits: Tensor) -> tuple[Tensor, RoutingPlan]:
        """The choice bool [N, B]."""
        num_branches = logits.shape[1]
        choice = logits.detach() > 0
        entries = torch.where(choice, torch.arange(num_branches, device=choice.device), -1)
        plan = sorting.route_unless(entries, self.undefined(logits), num_branches)
        checks.check_faults(logits, plan.host_header, entries_per_row=num_branches)
        return choice, plan

    def noise(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        return gumbel_like(logits, generator) - gumbel_like(logits, generator)

    def probs(self, logits: Tensor, temperature: float) -> Tensor:
        return (logits / temperature).sigmoid()

    def selected(self, choice: Tensor, num_branches: int) -> Tensor:
        return choice

    def merge(self, column: Sequence[Tensor], chosen: Tensor) -> Tensor:
        if column[0].dtype == torch.bool:
            raise TypeError("bool outputs of several branches cannot be summed; return integers")
        total = torch.zeros_like(column[0])
        for b, output in enumerate(column):
            total = total + torch.where(_like(chosen[:, b], output), output, 0)
        return total


class Uniform(Selection):
    """Every branch with the same weight, whatever a gate would say."""


TOP_ONE, MULTI_HOT, UNIFORM = TopOne(), MultiHot(), Uniform()


def selection_of(select: int | str) -> Selection:
    """The rule that `RoutedFusion(select=...)` names."""
    if select == "multi_hot":
        return MULTI_HOT
    return TOP_ONE if select == 1 else TopK(int(select))


class Decision(NamedTuple):
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

    rule: Selection
    choice: Tensor | None = None
    plan: RoutingPlan | None = None
    probs: Tensor | None = None
    rank_weights: Tensor | None = None
    grad: str | None = None

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
        """The weighted sum of one leaf of every branch."""
        if self.rule is UNIFORM:
            multipliers = _equal_weights(multipliers, column)
        return blend(column, multipliers, self.soft, self.rule)


def uniform(num_rows: int, num_columns: int, like: Tensor) -> Decision:
    """Every branch, or every depth, equally; as precise as `like`, in fp32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return Decision(
        UNIFORM, probs=like.new_full((num_rows, num_columns), 1 / num_columns, dtype=dtype)
    )


def blend(column: Sequence[Any], weights: Tensor, soft: bool, rule: Selection = TOP_ONE) -> Any:
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
    total = _like(weights[:, 0], first) * first
    for b, output in enumerate(column[1:], start=1):
        total = total + _like(weights[:, b], output) * output
    return total.to(movement.widest_dtype(column))


def _equal_weights(like: Tensor, column: Sequence[Any]) -> Tensor:
    """[N, B], 1 / B each, as precise as the outputs are."""
    dtypes = [leaf.dtype.to_real() for leaf in column if carries_gradient(leaf)]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return like.new_full(like.shape, 1 / like.shape[1], dtype=dtype)


def one_hot(choice: Tensor, num_branches: int) -> Tensor:
    """bool [N, B]: True in the chosen column; a row of False where the choice is -1."""
    return choice.unsqueeze(1) == torch.arange(num_branches, device=choice.device)


def straight_through(selected: Tensor, probs: Tensor) -> Tensor:
    """[N, B]: exactly `selected`, bool [N, B], with the gradient of `probs` (DynMM's hard gate).

    onehot - stopgrad(p) + p evaluates to exactly 0 and 1 in this order of operations.
    """
    return selected.to(probs.dtype) - probs.detach() + probs


def gumbel_like(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits).

    Drawn in fp32 at least, so that a half-precision uniform never rounds to 0 or 1.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    exponential = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    return -exponential.exponential_(generator=generator).log_().to(logits.dtype)


def tempered_softmax(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) over columns; a small temperature overflows no fp16."""
    if logits.dtype == torch.float16:
        logits = logits - logits.detach().amax(1, keepdim=True)
    return (logits / temperature).softmax(1)


def _like(column: Tensor, output: Tensor) -> Tensor:
    """[N], to be broadcast over the rows of `output`."""
    return column.view(-1, *[1] * (output.ndim - 1))


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
