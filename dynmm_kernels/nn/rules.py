"""Rules: which branches a sample takes, by its logits, and with what weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..functional import sorting
from ..functional.checks import LOGITS
from ..functional.plan import RoutingPlan

ROUNDING = 0.02  # how far from 1 the sum of probabilities in half precision may be


class Deciding(Protocol):
    """What a rule may read beside the logits."""

    temperature: float

    def costs(self) -> tuple[float, ...] | None:
        """Per sample, of each branch; None where one is unknown."""


class Rule:
    """How logits become a choice. One object of it serves any number of batches."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    wanted = LOGITS  # of what a gate returns, or a row is undefined

    def undefined(self, logits: Tensor) -> Tensor:
        """bool [N]: rows that decide nothing, a nan or no finite maximum."""
        return ~logits.amax(1).isfinite()

    def decide(self, logits: Tensor, fusion: Deciding) -> tuple[Tensor, RoutingPlan]:
        """The choice and its plan, in which the entries of undefined rows are faulty.

        `fusion`: for its settings and costs, which may change from call to call.
        """
        raise NotImplementedError

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> tuple[Rule, Tensor]:
        """Logits with noise, and the rule for them."""
        return self, logits + self.noise(logits, generator)

    def noise(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """[N, B]: added to the logits, it makes the decision a draw."""
        return gumbel_like(logits, generator)

    def logits_of(self, probs: Tensor) -> Tensor:
        """[N, B]: logits of which these are the `probs`; nan in rows that are no probabilities."""
        fits = (probs >= 0).all(1) & ((probs.sum(1) - 1).abs() <= ROUNDING)
        return torch.where(fits.unsqueeze(1), probs.log(), float("nan"))

    def probs(self, logits: Tensor, temperature: float) -> Tensor:
        """[N, B]: the weights of dense execution, and what the gate's gradient goes through."""
        return tempered_softmax(logits, temperature)

    def choose(self, logits: Tensor) -> Tensor:
        """The choice of `decide` without a plan, int64 [N]; -1 in an undefined row."""
        raise NotImplementedError

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
            total = torch.where(as_column(chosen[:, b], output), output, total)
        return total


class TopOne(Rule):
    """The branch with the largest logit (ties: the first), with weight one: DynMM's hard gate."""

    def decide(self, logits: Tensor, fusion: Deciding) -> tuple[Tensor, RoutingPlan]:
        """The choice int64 [N]."""
        return sorting.route_argmax(logits.detach() if logits.requires_grad else logits)

    def choose(self, logits: Tensor) -> Tensor:
        return sorting.choose(logits.detach())


class TopK(Rule):
    """The k branches of the largest logits, weighted by the softmax over these k.

    That is the mixture of experts of Shazeer et al. (2017): what is not among the k has weight 0
    and gets no gradient in masked execution, either.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def __repr__(self) -> str:
        return f"TopK({self.k})"

    def decide(self, logits: Tensor, fusion: Deciding) -> tuple[Tensor, RoutingPlan]:
        """The choice int64 [N, k], the most probable first."""
        choice = logits.detach().topk(self.k, dim=1).indices
        return choice, sorting.route_unless(choice, self.undefined(logits), logits.shape[1])

    def selected(self, choice: Tensor, num_branches: int) -> Tensor:
        none = torch.zeros(len(choice), num_branches, dtype=torch.bool, device=choice.device)
        return none.scatter(1, choice, True)

    def weights(self, choice: Tensor, probs: Tensor) -> Tensor:
        return torch.zeros_like(probs).scatter(1, choice, self.rank_weights(choice, probs))

    def rank_weights(self, choice: Tensor, probs: Tensor) -> Tensor:
        chosen = probs.gather(1, choice)
        return chosen / chosen.sum(1, keepdim=True)


class MultiHot(Rule):
    """Every branch by itself: taken, with weight one, where its logit is positive (AdaMML).

    The gradient goes through the sigmoid. A sample may take several branches, which are summed,
    or none.
    """

    def undefined(self, logits: Tensor) -> Tensor:
        return logits.isnan().any(1)

    def decide(self, logits: Tensor, fusion: Deciding) -> tuple[Tensor, RoutingPlan]:
        """The choice bool [N, B]."""
        choice = logits.detach() > 0
        return choice, _plan_of(choice, self.undefined(logits))

    def noise(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        return gumbel_like(logits, generator) - gumbel_like(logits, generator)

    def logits_of(self, probs: Tensor) -> Tensor:
        return probs.logit()  # nan outside 0..1

    def probs(self, logits: Tensor, temperature: float) -> Tensor:
        return (logits / temperature).sigmoid()

    def selected(self, choice: Tensor, num_branches: int) -> Tensor:
        return choice

    def merge(self, column: Sequence[Tensor], chosen: Tensor) -> Tensor:
        if column[0].dtype == torch.bool:
            raise TypeError("bool outputs of several branches cannot be summed; return integers")
        total = torch.zeros_like(column[0])
        for b, output in enumerate(column):
            total = total + torch.where(as_column(chosen[:, b], output), output, 0)
        return total


class Uniform(Rule):
    """Every branch with the same weight, whatever a gate would say."""


class Probabilities(Rule):
    """A rule for a gate that returns what `probs` would make of its logits."""

    wanted = "probabilities must be in 0..1, and those of a softmax sum to 1"

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def undefined(self, probs: Tensor) -> Tensor:
        return self.rule.logits_of(probs).isnan().any(1)

    def decide(self, probs: Tensor, fusion: Deciding) -> tuple[Tensor, RoutingPlan]:
        return self.rule.decide(self.rule.logits_of(probs.detach()), fusion)

    def choose(self, probs: Tensor) -> Tensor:
        return self.rule.choose(self.rule.logits_of(probs.detach()))

    def draw(self, probs: Tensor, generator: torch.Generator | None) -> tuple[Rule, Tensor]:
        return self.rule.draw(self.rule.logits_of(probs), generator)

    def probs(self, probs: Tensor, temperature: float) -> Tensor:
        return probs

    def selected(self, choice: Tensor, num_branches: int) -> Tensor:
        return self.rule.selected(choice, num_branches)

    def weights(self, choice: Tensor, probs: Tensor) -> Tensor:
        return self.rule.weights(choice, probs)

    def rank_weights(self, choice: Tensor, probs: Tensor) -> Tensor | None:
        return self.rule.rank_weights(choice, probs)

    def merge(self, column: Sequence[Tensor], chosen: Tensor) -> Tensor:
        return self.rule.merge(column, chosen)


class Weights(Rule):
    """For a gate that returns zeros and ones, with a gradient of their own; at most one one."""

    wanted = "weights must be zeros and ones, at most one of them in a row"

    def undefined(self, weights: Tensor) -> Tensor:
        return _no_ones(weights) | ((weights > 0.5).sum(1) > 1)

    def decide(self, weights: Tensor, fusion: Deciding) -> tuple[Tensor, RoutingPlan]:
        """The choice int64 [N], -1 in a row of zeros."""
        weights = weights.detach()
        choice = torch.where(weights.amax(1) > 0.5, weights.argmax(1), -1)
        undefined = self.undefined(weights)
        return choice, sorting.route_unless(choice.unsqueeze(1), undefined, weights.shape[1])

    def probs(self, weights: Tensor, temperature: float) -> Tensor:
        return weights


class OneWeight(Weights):
    """Exactly one in every row: for depths, of which every sample has one."""

    wanted = "weights must be zeros and exactly one one in a row"

    def undefined(self, weights: Tensor) -> Tensor:
        return super().undefined(weights) | (weights.amax(1) <= 0.5)

    def choose(self, weights: Tensor) -> Tensor:
        weights = weights.detach()
        return torch.where(self.undefined(weights), -1, weights.argmax(1))


class SeveralWeights(MultiHot):
    """For a gate that returns zeros and ones, any number of ones."""

    wanted = "weights must be zeros and ones"

    def undefined(self, weights: Tensor) -> Tensor:
        return _no_ones(weights)

    def decide(self, weights: Tensor, fusion: Deciding) -> tuple[Tensor, RoutingPlan]:
        choice = weights.detach() > 0.5
        return choice, _plan_of(choice, self.undefined(weights))

    def probs(self, weights: Tensor, temperature: float) -> Tensor:
        return weights


TOP_ONE, MULTI_HOT, UNIFORM = TopOne(), MultiHot(), Uniform()
DEPTH_RULES: dict[str, Any] = {
    "logits": TOP_ONE,
    "probabilities": Probabilities(TOP_ONE),
    "weights": OneWeight(),
}


def rule_of(select: int | str, num_branches: int, returns: str = "logits") -> Rule:
    """The rule that `RoutedFusion(select=..., gate_returns=...)` names.

    Raises:
        ValueError: none, or more branches than there are.
    """
    if select != "multi_hot" and (type(select) is not int or select < 1):
        raise ValueError(
            f"RoutedFusion: select must be a number of branches or 'multi_hot'; got {select!r}"
        )
    if type(select) is int and select > num_branches:
        raise ValueError(f"RoutedFusion: select={select} of only {num_branches} branches")
    if returns == "weights":
        return Weights() if select == 1 else SeveralWeights()
    rule = TOP_ONE if select == 1 else MULTI_HOT if select == "multi_hot" else TopK(int(select))
    return Probabilities(rule) if returns == "probabilities" else rule


def _plan_of(choice: Tensor, undefined: Tensor) -> RoutingPlan:
    """The plan of a choice bool [N, B]."""
    num_branches = choice.shape[1]
    entries = torch.where(choice, torch.arange(num_branches, device=choice.device), -1)
    return sorting.route_unless(entries, undefined, num_branches)


def _no_ones(weights: Tensor) -> Tensor:
    """bool [N]: rows with anything but zeros and ones, up to what hard + y - y.detach() rounds."""
    return ~((weights.abs() <= ROUNDING) | ((weights - 1).abs() <= ROUNDING)).all(1)


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
    if temperature != 1.0:
        logits = logits / temperature
    return logits.softmax(1)


def as_column(column: Tensor, output: Tensor) -> Tensor:
    """[N], to be broadcast over the rows of `output`."""
    return column.view(-1, *[1] * (output.ndim - 1))
