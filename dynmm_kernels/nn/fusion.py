"""RoutedFusion: a gate decides per sample which branch it needs; only that branch runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import tree
from .arguments import Arguments
from .branch import Branch
from .execution import Decision, run_everywhere, run_routed
from .gates import gumbel_like, one_hot, straight_through
from .routing import Routing

_CHOICES: dict[str, tuple[Any, ...]] = {
    "execution": ("auto", "dense", "masked", "routed"),
    "gate_grad": ("straight_through", "selected", "none"),
    "noise": (None, "gumbel"),
    "batch_norm": ("masked", "subset"),
}


class RoutedFusion(nn.Module):
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
            a graph. "selected": from the chosen branch alone, cheapest, biased. "none": no gradient.
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
        super().__init__()
        named = isinstance(branches, Mapping)
        names = list(branches) if named else list(range(len(branches)))
        if not names:
            raise ValueError("RoutedFusion: branches is empty; give at least one module")
        self.gate = _as_branch(gate, "gate")
        self.branches = nn.ModuleList(_as_branch(branches[name], str(name)) for name in names)  # type: ignore[index]
        labels = [branch.name for branch in self.branches]
        if len(set(labels)) < len(labels):
            raise ValueError(f"RoutedFusion: branch names must differ; got {labels}")
        self.execution = execution
        self.gate_grad = gate_grad
        self.temperature = temperature
        self.noise = noise
        self.batch_norm = batch_norm

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHOICES and value not in _CHOICES[name]:
            wanted = ", ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"RoutedFusion: {name} must be one of {wanted}; got {value!r}")
        if name == "temperature" and not value > 0:
            raise ValueError(f"RoutedFusion: temperature must be positive; got {value!r}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"execution={self.execution!r}, gate_grad={self.gate_grad!r}"

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
            choice: forces the decision, and the gate is not run. An int: that branch for all. A
                LongTensor [N]: that branch for each sample, -1 for none (its output is zero).
            return_routing: also return the `Routing`.
            generator: for the gate noise.

        Raises:
            ValueError, TypeError: gate logits, choice, inputs or outputs that do not fit; the
                message names the branch, what came and what was wanted.
        """
        leaves, _ = tree.flatten(inputs)
        num_rows = tree.batch_size(leaves, "RoutedFusion inputs")
        dense = self.execution == "dense" and choice is None
        if choice is None:
            decision = self._ask_gate(inputs, num_rows, dense or return_routing, generator)
        else:
            decision = self._forced(choice, num_rows, leaves)
        plan, branches = decision.plan, list(self.branches)
        if dense:
            output, rows_run = run_everywhere(branches, inputs, decision.probs, soft=True)
        elif self.execution == "masked" or not any(plan.counts):
            weights = self._hard_weights(decision)
            output, rows_run = run_everywhere(branches, inputs, weights, soft=False)
        else:
            subset_norm = self.batch_norm == "subset"
            output, rows_run = run_routed(branches, inputs, decision, subset_norm)
        if not return_routing:
            return output
        costs = [branch.cost for branch in branches]
        return output, Routing(
            choice=None if dense else decision.choice,
            probs=decision.probs,
            plan=None if dense else plan,
            num_rows=plan.num_rows,
            rows_run=rows_run,
            costs=None if None in costs else tuple(costs),
            gate_cost=0.0 if choice is not None else self.gate.cost or 0.0,
        )

    def _ask_gate(
        self,
        inputs: tuple[Any, ...],
        num_rows: int | None,
        wants_probs: bool,
        generator: torch.Generator | None,
    ) -> Decision:
        arguments = Arguments(self.gate.select(inputs), self.gate.label)
        logits = self.gate.call(arguments.whole(num_rows or 0))
        self._check_logits(logits, num_rows)
        if self.noise == "gumbel" and self.training:
            logits = logits + gumbel_like(logits, generator)
        choice, plan = F.route_argmax(logits.detach() if logits.requires_grad else logits)
        faults, row = plan.faults
        if faults:
            raise ValueError(
                f"gate {self.gate.label}: logits must have a finite maximum and no nan; got "
                f"{logits[row].tolist()} in row {row} ({faults} such rows in all)"
            )
        learns = logits.requires_grad and torch.is_grad_enabled() and self.gate_grad != "none"
        probs = (logits / self.temperature).softmax(1) if wants_probs or learns else None
        return Decision(choice, probs, plan, self.gate_grad if learns else None)

    def _check_logits(self, logits: Any, num_rows: int | None) -> None:
        wanted = f"[{'N' if num_rows is None else num_rows}, {len(self.branches)}]"
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(
                f"gate {self.gate.label} must return floating logits {wanted}; got {got}"
            )
        rows, columns = logits.shape if logits.ndim == 2 else (-1, -1)
        if columns != len(self.branches) or num_rows not in (None, rows):
            raise ValueError(
                f"gate {self.gate.label} must return logits of shape {wanted}, one column per "
                f"branch; got {list(logits.shape)}"
            )

    def _forced(self, choice: int | Tensor, num_rows: int | None, leaves: list[Any]) -> Decision:
        if isinstance(choice, int) and not isinstance(choice, bool):
            if not 0 <= choice < len(self.branches):
                raise ValueError(
                    f"choice must be in 0..{len(self.branches) - 1} (or a LongTensor [N]); "
                    f"got {choice}"
                )
            if num_rows is None:
                raise ValueError("choice: the inputs hold no tensor, so give a LongTensor [N]")
            device = next(x.device for x in leaves if isinstance(x, Tensor) and x.ndim > 0)
            choice = torch.full((num_rows,), choice, device=device)
        elif not isinstance(choice, Tensor) or choice.dtype not in (torch.int64, torch.int32):
            got = choice.dtype if isinstance(choice, Tensor) else type(choice).__name__
            raise TypeError(f"choice must be an int or a LongTensor [N]; got {got}")
        elif choice.ndim != 1 or num_rows not in (None, choice.shape[0]):
            size = "N" if num_rows is None else num_rows
            raise ValueError(f"choice must have shape [{size}]; got {list(choice.shape)}")
        plan = F.route(choice, len(self.branches))
        return Decision(choice.long(), None, plan, gradient=None)

    def _hard_weights(self, decision: Decision) -> Tensor:
        """[N, B] zeros and ones, with the gradient that `gate_grad` asks for."""
        if decision.gradient is None or decision.probs is None:
            dtype = torch.float32 if decision.probs is None else decision.probs.dtype
            return one_hot(decision.choice, len(self.branches), dtype)
        weights = straight_through(decision.choice, decision.probs)
        if decision.gradient == "selected":
            return torch.where(weights.detach() == 0, 0, weights)
        return weights


def _as_branch(module: nn.Module, name: str) -> Branch:
    branch = module if isinstance(module, Branch) else Branch(module)
    if branch.name is None:
        branch.name = name
    return branch
