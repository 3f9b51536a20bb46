"""One group of a benchmark as calls: every row over the same weights, data and decisions."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import baselines
from benchmarks.baselines import Bare, Experts
from benchmarks.ceilings import ceiling
from benchmarks.contest import Contest, Outcome, Row
from benchmarks.reference import (
    TOLERANCE,
    gradient_vectors,
    reference_gradients,
    reference_outputs,
    relative_error,
)
from benchmarks.workloads import WORKLOADS, PlannedGate, planned_choice, planned_logits
from dynmm_kernels import Branch, RoutedFusion
from dynmm_kernels.measure.memory import peak_bytes, saved_bytes

Runs = dict[str, Callable[[], Any]]

# Row -> the kind of blend it must agree with (see reference.py).
FORWARD = {
    "static_e1": "static_e1",
    "static_e2": "static_e2",
    "dense": "dense",
    "masked": "masked",
    "masked_compiled": "masked",
    "loop": "masked",
    "routed": "masked",
    "auto": "masked",
    "bare": "masked",
}
TRAINING = {
    "static_e1": "static_e1",
    "static_e2": "static_e2",
    "dense": "dense",
    "masked": "masked",
    "loop": "selected",
    "routed": "masked",
    "auto": "masked",
    "routed_selected": "selected",
    "bare": "masked",
    "bare_selected": "selected",
}
BARE = {"routed": "bare", "routed_selected": "bare_selected"}  # the same work, without routing
SPARSE = ("loop", *BARE, *BARE.values())  # rows that could win


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

    @property
    def blends(self) -> dict[str, str]:
        return TRAINING if self.training else FORWARD

    @property
    def counts(self) -> tuple[int, int]:
        costly = round(self.p * self.n)
        return self.n - costly, costly

    def ceiling(self, row: str) -> float:
        learning = "selected" if self.blends[row] == "selected" else "straight_through"
        gate_grad = learning if self.training else None
        return ceiling(WORKLOADS[self.workload].costs, self.counts, gate_grad)

    def info(self, outcome: Outcome, row: str) -> dict[str, Any]:
        """What goes beside the times of one row."""
        costs = WORKLOADS[self.workload].costs
        info = {
            "workload": self.workload,
            "kind": "training" if self.training else "forward",
            "n": self.n,
            "p": self.p,
            "row": row,
            "counts": self.counts,
            "macs_gate": costs.gate,
            "macs_branches": costs.branches,
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "error": outcome.errors[row],
            **{f"{what}_mb": count / 1e6 for what, count in outcome.memory[row].items()},
            **outcome.gains(row),
        }
        if row in BARE:
            same_gradient = self.blends[row] == self.blends["loop"]
            info["loop_over_routed"] = outcome.ratio("loop", row) if same_gradient else None
        return info


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

    @cached_property
    def auto(self) -> RoutedFusion:
        fusion = routed_fusion(self.gate, self.experts)
        fusion.training = self.setting.training  # of the parts it was set
        return fusion

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
            "auto": lambda: self.auto(x),
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

    def rows(self) -> dict[str, Row]:
        """Forwards, or training steps without the optimizer."""
        if not self.setting.training:
            return {name: self._row(name, call) for name, call in self.forwards().items()}
        known = self.parameters() + tree_leaves(self.x)
        return {
            name: self._row(
                name, self._step(loss), saved=lambda loss=loss: saved_bytes(loss, known)
            )
            for name, loss in self.losses().items()
        }

    def _step(self, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            self.forget_gradients()
            loss().backward()

        return step

    def _row(self, name: str, call: Callable[[], Any], **memory: Callable[[], int]) -> Row:
        def peak() -> int:
            self.forget_gradients()
            return peak_bytes(call, self.setting.device)

        limit = self.setting.ceiling(name) if name in SPARSE else None
        return Row(call, BARE.get(name), limit, {"peak": peak, **memory})

    def errors(self) -> dict[str, float]:
        """Of every row, against fp64."""
        return self._gradient_errors() if self.setting.training else self._output_errors()

    def _output_errors(self) -> dict[str, float]:
        exact = self.double()
        references = reference_outputs(exact.gate, exact.experts, exact.x, self.setting.n)
        bare = Bare.prepare(self.gate, self.experts, self.x, self.choice)
        errors = {}
        for name, row in self.rows().items():
            output, reference = row.call(), references[FORWARD[name]]
            if name == "bare":
                output = torch.cat(output)
                reference = torch.cat([reference[rows] for _, _, rows in bare.selected])
            errors[name] = relative_error(output, reference)
        return errors

    def _gradient_errors(self) -> dict[str, float]:
        """The worst of the gradients' errors; the gate's does not count for the bare calls."""
        exact = self.double()
        loss = WORKLOADS[self.setting.workload].loss
        references = reference_gradients(exact.gate, exact.experts, exact.x, exact.target, loss)
        errors = {}
        for name, row in self.rows().items():
            row.call()
            gradients = gradient_vectors(self.gate, self.experts)
            if name in BARE.values():
                del gradients["gate"]
            reference = references[TRAINING[name]]
            errors[name] = max(relative_error(g, reference[part]) for part, g in gradients.items())
        return errors


def contest(setting: Setting) -> Contest:
    """Checked without dropout (draws differ between rows), to be timed with the paper's."""
    errors = Problem.build(setting, dropout=0.0).errors()
    problem = Problem.build(setting)
    problem.auto.calibrate(problem.x, rounds=3)
    return Contest(problem.rows(), errors, TOLERANCE[setting.dtype], setting.device)
