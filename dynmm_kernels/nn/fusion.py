"""RoutedFusion: a gate decides per sample which branch it needs; only that branch runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..plan import RoutingPlan
from .arguments import Arguments
from .branch import Branch, as_branch
from .execution import Learning, run_everywhere, run_routed
from .flat import run_flat
from .gates import forced, gumbel_like, one_hot, straight_through
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
        noise: None, or "gumbel" to sample the choice (DynMM eq. 3) while training.
        batch_norm: what a branch with train-mode BatchNorm does when routed. "masked": it runs on
            the whole batch, which is exact. "subset": on its own samples, whose statistics differ.

    All five may be changed between calls; parameters and state_dict are the same in every mode.
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
        batch_norm: str = "masked",
    ) -> None:
        super().__init__(execution, gate_grad, temperature, noise, batch_norm)
        named = branches.items() if isinstance(branches, Mapping) else enumerate(branches)
        self.gate = as_branch(gate, "gate")
        self.branches = nn.ModuleList(as_branch(module, str(name)) for name, module in named)
        names = [branch.name for branch in self.branches]
        if not names:
            raise ValueError("RoutedFusion: branches is empty; give at least one module")
        if len(set(names)) < len(names):
            raise ValueError(f"RoutedFusion: branch names must differ; got {names}")

    def forward(
        self,
        *inputs: Any,
        choice: int | Tensor | None = None,
        return_routing: bool = False,
        generator: torch.Generator | None = None,
    ) -> Any:
        """The fused output, in sample order.

        Args:
            inputs: what the model takes: tensors [N, ...] in any nesting of lists, tuples and
                dicts. `Shared` and `Lazy` mark what is not gathered, or only fetched when needed.
            choice: forces a hard decision, in any mode, and the gate is not run. An int: that
                branch for all. A LongTensor [N]: one per sample, -1 for none (zero output).
            return_routing: also return the `Routing`.
            generator: for the gate noise.

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
        dense = self.execution == "dense" and choice is None
        learning = probs = None
        gate_cost = 0.0
        if choice is None:
            logits = self._ask_gate(batch, len(branches), generator)
            choice, plan = self._decide(logits)
            learns = self.gate_grad != "none" and logits.requires_grad and torch.is_grad_enabled()
            if learns or dense or return_routing:
                probs = (logits / self.temperature).softmax(1)
                gate_cost = self.gate.cost or 0.0
                learning = Learning(self.gate_grad, probs, choice) if learns else None
        else:
            device = batch.tensors()[0].device if batch.num_rows is not None else None
            choice = forced(choice, "choice", len(branches), batch.num_rows, device)
            plan = F.route(choice, len(branches))

        if dense and probs is not None:
            output, rows_run = run_everywhere(branches, batch, probs, soft=True)
        elif self.execution == "masked" or not any(plan.counts):
            weights = _hard_weights(choice, probs, learning, len(branches))
            output, rows_run = run_everywhere(branches, batch, weights, soft=False)
        else:
            subset_norm = self.batch_norm == "subset"
            output, rows_run = run_routed(branches, batch, plan, learning, subset_norm)
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
        )

    def _ask_gate(
        self, batch: Arguments, num_branches: int, generator: torch.Generator | None
    ) -> Tensor:
        """Logits [N, B], with noise where that is wanted."""
        gate: Branch = self._modules["gate"]  # type: ignore[assignment]
        logits = gate.call(gate.arguments(batch).whole(batch.num_rows))
        F.check_logits(logits, batch.num_rows, num_branches)
        if self.noise == "gumbel" and self.training:
            return logits + gumbel_like(logits, generator)
        return logits

    def _decide(self, logits: Tensor) -> tuple[Tensor, RoutingPlan]:
        """The choice int64 [N] and its plan; the check of the logits rides on the counts."""
        choice, plan = F.route_argmax(logits.detach() if logits.requires_grad else logits)
        F.check_faults(logits, plan.host_header)
        return choice, plan


def _hard_weights(
    choice: Tensor, probs: Tensor | None, learning: Learning | None, num_branches: int
) -> Tensor:
    """[N, B] zeros and ones, with the gradient that `gate_grad` asks for."""
    if learning is None:
        dtype = torch.float32 if probs is None else probs.dtype
        return one_hot(choice, num_branches, dtype)
    weights = straight_through(choice, learning.probs)
    if learning.mode == "selected":
        return torch.where(weights.detach() == 0, 0, weights)
    return weights
