"""The ways to run a gated model without this library, as a user writes them.

Every function takes the gate, the experts and the input, and returns the output in sample order.
The gate may be a :class:`~benchmarks.workloads.PlannedGate`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.workloads import Expert

Experts = dict[str, Expert]
Loss = Callable[[Tensor, Tensor], Tensor]


def take(x: Any, rows: Tensor) -> Any:
    """The given rows of every tensor in x."""
    return tree_map(lambda tensor: tensor.index_select(0, rows), x)


def straight_through(logits: Tensor) -> Tensor:
    """One-hot in value, softmax in gradient: DynMM's hard gate."""
    soft = logits.softmax(dim=1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


def straight_through_selected(logits: Tensor) -> Tensor:
    """The same, but only the chosen branch's weight carries a gradient."""
    soft = logits.softmax(dim=1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    return hard * (1 - soft.detach() + soft)


def masked(gate: nn.Module, experts: Experts, x: Any, weigh=straight_through) -> Tensor:
    """Every expert on every sample, multiplied by 0 or 1: what the authors' code does."""
    weights = weigh(gate(x))
    outputs = [expert(x) for expert in experts.values()]
    return sum(weights[:, b : b + 1] * output for b, output in enumerate(outputs))


def dense(gate: nn.Module, experts: Experts, x: Any) -> Tensor:
    """Every expert on every sample, weighted softly."""
    return masked(gate, experts, x, weigh=lambda logits: logits.softmax(dim=1))


def static(experts: Experts, name: str, x: Any) -> Tensor:
    """One expert for everyone, no gate."""
    return experts[name](x)


def handwritten_loop(gate: nn.Module, experts: Experts, x: Any) -> Tensor:
    """Each expert on its own samples. In training the gate gets the selected-only gradient."""
    weights = straight_through(gate(x))
    choice = weights.argmax(dim=1)
    out = None
    for b, expert in enumerate(experts.values()):
        rows = (choice == b).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        y = expert.module(take(expert.read(x), rows))
        if torch.is_grad_enabled():
            y = y * weights[rows, b].unsqueeze(1)
        if out is None:
            out = y.new_empty(len(choice), *y.shape[1:])
        out.index_copy_(0, rows, y)
    return out


@dataclass(frozen=True)
class Bare:
    """Gate and experts on rows already gathered, nothing put together.

    This is the work that no router can avoid; routed time over bare time is the overhead.
    ``unselected`` rows go forward without a graph, as an exact straight-through gate needs them.
    """

    gate: nn.Module
    x: Any
    selected: list[tuple[nn.Module, Any, Tensor]]
    """(module, gathered input, rows) of every expert that has rows."""
    unselected: list[tuple[nn.Module, Any, Tensor]]

    @classmethod
    def prepare(cls, gate: nn.Module, experts: Experts, x: Any, choice: Tensor) -> "Bare":
        """Gathers; not to be timed."""

        def calls(chosen: bool):
            for b, expert in enumerate(experts.values()):
                rows = ((choice == b) == chosen).nonzero().squeeze(1)
                if len(rows):
                    yield expert.module, take(expert.read(x), rows), rows

        return cls(gate, x, list(calls(True)), list(calls(False)))

    def forward(self) -> list[Tensor]:
        """The experts' outputs, in order of expert."""
        self.gate(self.x)
        return [module(x) for module, x, _ in self.selected]

    def loss(self, loss: Loss, target: Tensor, gate_grad: str) -> Tensor:
        """A scalar whose backward costs what the real one's does."""
        logits = self.gate(self.x)
        if gate_grad == "straight_through":
            with torch.no_grad():
                for module, x, _ in self.unselected:
                    module(x)
        total = logits.mean()
        for module, x, rows in self.selected:
            total = total + len(rows) / len(target) * loss(module(x), target[rows])
        return total
