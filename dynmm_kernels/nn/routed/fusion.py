"""RoutedFusion: a gate decides per sample which branch it needs; only that branch runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...functional import autograd, checks, sorting
from ...functional.plan import RoutingPlan
from ..arguments import Arguments
from ..branch import Branch, Branches, as_branch
from ..decision import TopOne, forced, selection_of
from ..routing import Routing
from ..settings import Settings
from .execution import Learning, call_whole, run_everywhere, run_routed
from .flat import run_flat


class RoutedFusion(Settings):
    """Runs, for every sample, the branch its gate chooses, and only that (DynMM, eq. 1-3).

    Args:
        gate: module or `Branch`, called like a branch; returns logits [N, B].
        branches: modules or `Branch`es, a sequence or a dict by name. All return the same
            structure: a tensor [n, ...] or a pytree of such.
        execution: "routed": each branch on its own samples only. "masked": every branch on every
            sample, times 0 or 1. "dense": every branch on every sample, times its probability.
            "auto": routed.
        gate_grad: the gradient of the gate where its graph is recorded. "straight_through": exactly
            that of masked execution; the samples a branch was not chosen for run through it without
            a graph. "selected": from the chosen branch alone; cheapest, biased. "none": none.
            Dense execution always differentiates its probabilities.
        temperature: of the softmax.
        noise: None; "gumbel" to sample the choice (DynMM eq. 3) while training; "gumbel_always" to
            sample it in eval, too.
        select: how many branches a sample takes. 1: that of the largest logit. k: those of the k
            largest, weighted by the softmax over these k (mixture of experts; `gate_grad`
            "selected" and "straight_through" are then the same). "multi_hot": every branch whose
            logit is positive, unweighted and summed, with the straight-through gradient of the
            sigmoid (AdaMML); none: zeros.
        batch_norm: what a branch with train-mode BatchNorm does when routed. "masked": it runs on
            the whole batch, which is exact. "subset": on its own samples, whose statistics differ.

    All six may be changed between calls; parameters and state_dict are the same in every mode.

    Example:
        >>> branches = {"cheap": nn.Linear(8, 3), "costly": nn.Linear(8, 3)}
        >>> fusion = RoutedFusion(nn.Linear(8, 2), branches)
        >>> choice = torch.tensor([0, 1, 0, 0])  # left out: the gate decides
        >>> output, routing = fusion(torch.randn(4, 8), choice=choice, return_routing=True)
        >>> output.shape, routing.counts
        (torch.Size([4, 3]), (3, 1))
    """

    def __init__(
        self,
        gate: nn.Module,
        branches: Sequence[nn.Module] | Mapping[str, nn.Module] | nn.ModuleDict,
        *,
        execution: str = "auto",
        gate_grad: str = "straight_through",
        temperature: float = 1.0,
        noise: str | None = None,
        select: int | str = 1,
        batch_norm: str = "masked",
    ) -> None:
        super().__init__(execution, gate_grad, temperature, noise, batch_norm)
        if not isinstance(branches, Iterable):
            raise TypeError(
                f"RoutedFusion: branches must be a sequence or a dict of modules; got "
                f"{type(branches).__name__}"
            )
        named: Iterable[tuple[Any, nn.Module]] = (
            branches.items()
            if isinstance(branches, (Mapping, nn.ModuleDict))
            else enumerate(branches)
        )
        self.gate = as_branch(gate, "gate")
        self.branches = Branches(as_branch(module, str(name)) for name, module in named)
        names = [branch.name for branch in self.branches]
        if not names:
            raise ValueError("RoutedFusion: branches is empty; give at least one module")
        if len(set(names)) < len(names):
            raise ValueError(f"RoutedFusion: branch names must differ; got {names}")
        self.select = select

    def forward(
        self,
        *inputs: Any,
        choice: int | str | Tensor | None = None,
        return_routing: bool = False,
        generator: torch.Generator | None = None,
    ) -> Any:
        """The fused output, in sample order.

        Args:
            inputs: what the model takes: tensors [N, ...] in any nesting of lists, tuples and
                dicts. `Shared` and `Lazy` mark what is not gathered, or only fetched when needed.
            choice: forces a hard decision, in any mode, and the gate is not run. An int: that
                branch for all. A LongTensor [N]: one per sample, -1 for none (zero output).
                "random": each equally likely (DynMM's Stage I). "uniform": the mean of all.
            return_routing: also return the `Routing`.
            generator: for the gate noise, and for random choices.

        Raises:
            ValueError, TypeError: gate logits, choice, inputs or outputs that do not fit; the
                message names the branch, what came and what was wanted.
        """
        if not (return_routing or torch.is_grad_enabled() or choice is not None):
            output = run_flat(self, inputs)
            if output is not None:
                return output
        batch = Arguments(inputs, "RoutedFusion inputs")
        branches: list[Branch] = list(self._modules["branches"]._modules.values())  # type: ignore[union-attr,arg-type]
        if choice is None:
            made = self._ask_gate(batch, len(branches), return_routing, generator)
        else:
            made = _obey(choice, batch, len(branches), generator)
        if made.dense and made.probs is not None:
            uniform = choice is not None
            output, rows_run = run_everywhere(
                branches, batch, made.probs, soft=True, uniform=uniform
            )
        elif self.execution == "masked" or not any(made.plan.counts):
            hard, soft = made.hard_weights(len(branches)), made.weights is not None
            several = made.plan.ranks > 1
            output, rows_run = run_everywhere(branches, batch, hard, soft, several)
        else:
            subset_norm = self.batch_norm == "subset"
            output, rows_run = run_routed(
                branches, batch, made.plan, made.learning, subset_norm, made.weights
            )
        if not return_routing:
            return output
        costs = tuple(branch.cost for branch in branches if branch.cost is not None)
        return output, Routing(
            choice=None if made.dense else made.choice,
            probs=made.probs,
            plan=None if made.dense else made.plan,
            num_rows=made.plan.num_rows,
            rows_run=rows_run,
            costs=costs if len(costs) == len(branches) else None,
            gate_cost=(self.gate.cost or 0.0) if choice is None else 0.0,
            selection=made.selection,
        )

    def _ask_gate(
        self,
        batch: Arguments,
        num_branches: int,
        reports: bool,
        generator: torch.Generator | None,
    ) -> Decision:
        gate: Branch = self._modules["gate"]  # type: ignore[assignment]
        logits = call_whole(gate, batch, batch.num_rows)
        checks.check_logits(logits, batch.num_rows, num_branches, batch.device)
        selection, dense = selection_of(self.select), self.execution == "dense"
        if self.draws:
            logits = logits + selection.noise(logits, generator)
        choice, plan = selection.decide(logits)
        learns = self.gate_grad != "none" and autograd.is_followed(logits)
        if not (learns or dense or reports or self.select != 1):
            return Decision(selection, choice, plan)
        probs = selection.probs(logits, self.temperature)
        weights = selection.soft_weights(choice, probs if learns else probs.detach())
        learning = None
        if learns and weights is None:
            selected = selection.selected(choice, num_branches)
            learning = Learning(self.gate_grad, probs, selected)
        return Decision(selection, choice, plan, probs, weights, learning, dense)

    def __setattr__(self, name: str, value: Any) -> None:
        number = type(value) is int and value >= 1
        if name == "select" and not (number or value == "multi_hot"):
            raise ValueError(
                f"RoutedFusion: select must be a number of branches or 'multi_hot'; got {value!r}"
            )
        if name == "select" and number and value > len(self.branches):
            raise ValueError(f"RoutedFusion: select={value} of only {len(self.branches)} branches")
        super().__setattr__(name, value)


class Decision(NamedTuple):
    """What a batch was decided to do.

    `weights` [N, k]: of the ranks of the plan, where they are not ones. `dense`: every branch runs,
    weighted by `probs` [N, B].
    """

    selection: TopOne
    choice: Tensor
    plan: RoutingPlan
    probs: Tensor | None = None
    weights: Tensor | None = None
    learning: Learning | None = None
    dense: bool = False

    def hard_weights(self, num_branches: int) -> Tensor:
        """[N, B]: of the chosen branches, with the gradient that `gate_grad` asks for."""
        if self.weights is not None:
            zeros = self.weights.new_zeros(self.plan.num_rows, num_branches)
            return zeros.scatter(1, self.choice, self.weights)
        if self.learning is None:
            dtype = torch.float32 if self.probs is None else self.probs.dtype
            return self.selection.selected(self.choice, num_branches).to(dtype)
        weights = self.selection.weights(self.choice, self.learning.probs)
        if self.learning.mode == "selected":
            return torch.where(self.learning.selected, weights, 0)
        return weights


def _obey(
    choice: Any, batch: Arguments, num_branches: int, generator: torch.Generator | None
) -> Decision:
    """A forced decision."""
    device = batch.device
    uniform = isinstance(choice, str) and choice == "uniform"
    chosen = forced(
        0 if uniform else choice, "choice", num_branches, batch.num_rows, device, generator
    )
    plan = sorting.route(chosen, num_branches)
    if not uniform:
        return Decision(TopOne(), chosen, plan)
    shape = (plan.num_rows, num_branches)
    double = any(tensor.dtype == torch.float64 for tensor in batch.tensors())
    dtype = torch.float64 if double else torch.float32
    probs = torch.full(shape, 1 / num_branches, dtype=dtype, device=device)
    return Decision(TopOne(), chosen, plan, probs, dense=True)
