"""RoutedFusion: a gate decides per sample which branch it needs; only that branch runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .arguments import Arguments
from .branch import Branch, as_branch
from .decisions import TopOne, forced, selection_of
from .execution import Learning, run_everywhere, run_routed
from .flat import run_flat
from .routing import Routing
from .settings import Settings


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
    """

    def __init__(
        self,
        gate: nn.Module,
        branches: Sequence[nn.Module] | Mapping[str, nn.Module],
        *,
        execution: str = "auto",
        gate_grad: str = "straight_through",
        temperature: float = 1.0,
        noise: str | None = None,
        select: int | str = 1,
        batch_norm: str = "masked",
    ) -> None:
        super().__init__(execution, gate_grad, temperature, noise, batch_norm)
        self.select = select
        named = branches.items() if isinstance(branches, Mapping) else enumerate(branches)
        self.gate = as_branch(gate, "gate")
        self.branches = nn.ModuleList(as_branch(module, str(name)) for name, module in named)
        names = [branch.name for branch in self.branches]
        if not names:
            raise ValueError("RoutedFusion: branches is empty; give at least one module")
        if len(set(names)) < len(names):
            raise ValueError(f"RoutedFusion: branch names must differ; got {names}")
        if isinstance(select, int) and select > len(names):
            raise ValueError(f"RoutedFusion: select={select} of only {len(names)} branches")

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
        selection = TopOne() if choice is not None else selection_of(self.select)
        uniform = isinstance(choice, str) and choice == "uniform"
        dense = uniform or (self.execution == "dense" and choice is None)
        learning = probs = weights = None
        gate_cost = 0.0
        if choice is None:
            logits = self._ask_gate(batch, len(branches), selection, generator)
            choice, plan = selection.decide(logits)
            learns = self.gate_grad != "none" and logits.requires_grad and torch.is_grad_enabled()
            if learns or dense or return_routing or self.select != 1:
                probs = selection.probs(logits, self.temperature)
                gate_cost = self.gate.cost or 0.0
                weights = selection.soft_weights(choice, probs if learns else probs.detach())
                if learns and weights is None:
                    selected = selection.selected(choice, len(branches))
                    learning = Learning(self.gate_grad, probs, selected)
        else:
            device = batch.tensors()[0].device if batch.num_rows is not None else None
            choice = 0 if uniform else choice
            choice = forced(choice, "choice", len(branches), batch.num_rows, device, generator)
            plan = F.route(choice, len(branches))
            if uniform:
                probs = torch.full((plan.num_rows, len(branches)), 1 / len(branches), device=device)

        if dense and probs is not None:
            output, rows_run = run_everywhere(branches, batch, probs, soft=True)
        elif self.execution == "masked" or not any(plan.counts):
            hard = self._hard_weights(selection, choice, probs, learning, weights)
            output, rows_run = run_everywhere(branches, batch, hard, soft=weights is not None)
        else:
            subset_norm = self.batch_norm == "subset"
            output, rows_run = run_routed(branches, batch, plan, learning, subset_norm, weights)
        if not return_routing:
            return output
        costs = tuple(branch.cost for branch in branches if branch.cost is not None)
        return output, Routing(
            choice=None if dense else choice,
            probs=probs,
            plan=None if dense else plan,
            num_rows=plan.num_rows,
            rows_run=rows_run,
            costs=costs if len(costs) == len(branches) else None,
            gate_cost=gate_cost,
            selection=selection,
        )

    def _ask_gate(
        self,
        batch: Arguments,
        num_branches: int,
        selection: TopOne,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Logits [N, B], with noise where that is wanted."""
        gate: Branch = self._modules["gate"]  # type: ignore[assignment]
        logits = gate.call(gate.arguments(batch).whole(batch.num_rows))
        F.check_logits(logits, batch.num_rows, num_branches)
        return logits + selection.noise(logits, generator) if self.draws else logits

    def _hard_weights(
        self,
        selection: TopOne,
        choice: Tensor,
        probs: Tensor | None,
        learning: Learning | None,
        soft_weights: Tensor | None,
    ) -> Tensor:
        """[N, B]: of the chosen branches, with the gradient that `gate_grad` asks for."""
        if soft_weights is not None:
            weights = soft_weights.new_zeros(len(choice), len(self.branches))
            return weights.scatter(1, choice, soft_weights)
        if learning is None:
            dtype = torch.float32 if probs is None else probs.dtype
            return selection.selected(choice, len(self.branches)).to(dtype)
        weights = selection.weights(choice, learning.probs)
        if learning.mode == "selected":
            return torch.where(learning.selected, weights, 0)
        return weights

    def __setattr__(self, name: str, value: Any) -> None:
        number = type(value) is int and value >= 1
        if name == "select" and not (number or value == "multi_hot"):
            raise ValueError(
                f"RoutedFusion: select must be a number of branches or 'multi_hot'; got {value!r}"
            )
        super().__setattr__(name, value)
