"""One group of a benchmark as calls: every row over the same weights, data and decisions."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks import baselines
from benchmarks.baselines import Bare, Experts
from benchmarks.workloads import WORKLOADS, PlannedGate, planned_choice, planned_logits
from dynmm_kernels import Branch, RoutedFusion

Runs = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Setting:
    workload: str
    n: int
    p: float
    training: bool
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    """Add masked under torch.compile; inference only."""

    def __str__(self) -> str:
        kind = "training" if self.training else "forward"
        return f"{kind} {self.workload} N={self.n} p={self.p:g}"


def freeze_batch_norm(module: nn.Module) -> None:
    """Running statistics instead of the batch's.

    A batch norm that trains couples the samples of a batch, so routing leaves such a branch on
    the whole batch and there would be nothing to measure; with frozen statistics it is routed.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def routed_fusion(gate: nn.Module, experts: Experts, **options: Any) -> RoutedFusion:
    branches = {name: Branch(expert.module, inputs=expert.view) for name, expert in experts.items()}
    return RoutedFusion(gate, branches, **options)


@dataclass
class Problem:
    """The model, the data and the decisions of one setting."""

    setting: Setting
    gate: PlannedGate
    experts: Experts
    x: Any
    target: Tensor
    choice: Tensor

    @classmethod
    def build(cls, setting: Setting, **model: Any) -> "Problem":
        workload = WORKLOADS[setting.workload]
        real_gate, experts = workload.make_model(setting.dtype, **model)
        choice = planned_choice(setting.n, setting.p)
        gate = PlannedGate(real_gate, planned_logits(choice))
        for module in (gate, *experts.values()):
            module.to(setting.device).train(setting.training)
            freeze_batch_norm(module)
        x = tree_map(
            lambda tensor: tensor.to(setting.device),
            workload.make_inputs(setting.n, setting.dtype),
        )
        target = workload.make_target(setting.n, setting.dtype).to(setting.device)
        return cls(setting, gate, experts, x, target, choice.to(setting.device))

    def double(self) -> "Problem":
        gate, experts = copy.deepcopy((self.gate, self.experts))
        for module in (gate, *experts.values()):
            module.double()
        x = tree_map(lambda t: t.double() if t.is_floating_point() else t, self.x)
        return Problem(self.setting, gate, experts, x, self.target.double(), self.choice)

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in (self.gate, *self.experts.values()) for p in module.parameters()]

    def forget_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def forwards(self) -> Runs:
        """Row -> a call that returns the output; "bare" returns one output per expert."""
        gate, experts, x = self.gate, self.experts, self.x
        fusion = routed_fusion(gate, experts, execution="routed")
        runs: Runs = {
            "static_e1": lambda: baselines.static(experts, "e1", x),
            "static_e2": lambda: baselines.static(experts, "e2", x),
            "dense": lambda: baselines.dense(gate, experts, x),
            "masked": lambda: baselines.masked(gate, experts, x),
            "loop": lambda: baselines.handwritten_loop(gate, experts, x),
            "routed": lambda: fusion(x),
            "bare": Bare.prepare(gate, experts, x, self.choice).forward,
        }
        if self.setting.compiled:
            compiled = torch.compile(baselines.masked)
            runs["masked_compiled"] = lambda: compiled(gate, experts, x)
        return runs

    def losses(self) -> Runs:
        """Row -> a call that returns the training loss."""
        loss, target = WORKLOADS[self.setting.workload].loss, self.target
        forwards = self.forwards()
        selected = routed_fusion(self.gate, self.experts, execution="routed", gate_grad="selected")
        forwards["routed_selected"] = lambda: selected(self.x)
        losses: Runs = {
            row: lambda forward=forward: loss(forward(), target)
            for row, forward in forwards.items()
            if row != "bare"
        }
        bare = Bare.prepare(self.gate, self.experts, self.x, self.choice)
        losses["bare"] = lambda: bare.loss(loss, target, "straight_through")
        losses["bare_selected"] = lambda: bare.loss(loss, target, "selected")
        return losses

    def steps(self) -> Runs:
        """Row -> a training step without the optimizer."""

        def step(loss: Callable[[], Tensor]) -> None:
            self.forget_gradients()
            loss().backward()

        return {row: lambda loss=loss: step(loss) for row, loss in self.losses().items()}
