"""Fusion-level routing: the segmentation nets of nyud.py, masked, routed and as bare calls.

Batch norm is frozen: in training it would couple the samples, and the stack would run masked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ceilings import stack_costs
from benchmarks.contest import Contest, Outcome, Row
from benchmarks.nyud import PATHS, SegmentationNet
from benchmarks.problem import freeze_batch_norm
from benchmarks.reference import TOLERANCE
from benchmarks.workloads import PlannedGate, planned_depths, planned_logits
from dynmm_kernels import NestedFusion
from dynmm_kernels.measure.memory import peak_bytes
from dynmm_kernels.nn import Add, SEAdd

ROWS = ("static", "masked", "routed", "bare")
READ = (1, 2, 3)  # stages whose outputs the decoder reads besides the last


@dataclass(frozen=True)
class StackSetting:
    kind: str
    n: int
    height: int
    mix: str
    training: bool
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        step = "Stage-I step" if self.training else "forward"
        size = f"{self.height}x{self.height * 4 // 3}"
        return f"{step} nyud-{self.kind} {size} N={self.n} mix {self.mix}"

    def gains(self, outcome: Outcome) -> dict[str, float | None]:
        """What routing wins, and what it costs."""
        peak = {row: outcome.memory[row]["peak"] for row in ("routed", "masked")}
        return {
            "routed_s": outcome.median("routed"),
            "masked_s": outcome.median("masked"),
            **outcome.gains("routed"),
            "static_over_routed": outcome.ratio("static", "routed"),
            "peak_over_masked": peak["routed"] / peak["masked"],
        }

    def info(self, outcome: Outcome, row: str) -> dict[str, Any]:
        """What goes beside the times of one row."""
        info = {"row": row, "setting": str(self), "error": outcome.errors[row]}
        return {**info, **self.gains(outcome)} if row == "routed" else info


class StackProblem:
    """The net, the images and the planned paths of one setting; every row shares the weights."""

    def __init__(self, setting: StackSetting):
        torch.manual_seed(0)
        self.setting = setting
        where = {"device": setting.device, "dtype": setting.dtype}
        self.net = SegmentationNet(setting.kind).to(**where).train(setting.training)
        freeze_batch_norm(self.net)
        size = (setting.height, setting.height * 4 // 3)
        self.rgb = torch.randn(setting.n, 3, *size, **where)
        self.depth = torch.randn(setting.n, 1, *size, **where)
        self.target = torch.randint(0, 40, (setting.n, *size), device=setting.device)
        self.paths = planned_depths(setting.n, setting.mix).to(setting.device)
        gate = PlannedGate(self.net.gate, planned_logits(self.paths, PATHS))
        self.gate = gate.to(setting.device)
        self.fusions = [self._ours(fusion) for fusion in self.net.fusions[1:]]
        self.nested = NestedFusion(
            self.gate, self.net.rgb.stages, self.net.depth.stages, self.fusions, execution="routed"
        )

    def _ours(self, fusion: nn.Module) -> nn.Module:
        """The library's fusion of the same kind, over the same parameters."""
        if self.setting.kind == "R34":
            return Add()
        ours = SEAdd(fusion.excite_main[0].in_features)
        ours.excite_main, ours.excite_aux = fusion.excite_main, fusion.excite_aux
        return ours

    def masked(self) -> Tensor:
        main, aux = self.net.stems(self.rgb, self.depth)
        random_policy = self.setting.training  # Stage I
        paths = self.paths if random_policy else self.gate(main, aux).argmax(1)
        weights = F.one_hot(paths, PATHS).to(main.dtype)
        return self.net.decode(self.net.masked(main, aux, weights))

    def routed(self) -> Tensor:
        main, aux = self.net.stems(self.rgb, self.depth)
        forced = self.paths if self.setting.training else None
        last, skips = self.nested(main, aux, depth=forced, stages=READ)
        return self.net.decode([*skips, last])

    def static(self) -> Tensor:
        """The net without a gate, depth always fused."""
        main, aux = self.net.stems(self.rgb, self.depth)
        outputs = []
        for k in range(4):
            main, aux = self.net.rgb.stages[k](main), self.net.depth.stages[k](aux)
            main = self.net.fusions[k + 1](main, aux)
            outputs.append(main)
        return self.net.decode(outputs)

    def bare(self) -> Callable[[], list[Tensor]]:
        """Every module called on tensors prepared beforehand: compact rows, nothing moved.

        What the modules cost on the rows they must see; no router can be without it. The last
        output of a stage stays in memory, as it does for the decoder. In training everything is
        followed by its backward.
        """
        order = self.paths.argsort(descending=True, stable=True)
        active = [int((self.paths > k).sum()) for k in range(4)]
        net, calls = self.net, []
        with torch.no_grad():
            main, aux = (x[order] for x in net.stems(self.rgb, self.depth))
            gate_inputs, outputs = (main, aux), []
            for k in range(4):
                count = active[k]
                r, a = net.rgb.stages[k](main), net.depth.stages[k](aux[:count].contiguous())
                calls.append([(net.rgb.stages[k], (main,))])
                if count:
                    calls[k].append((net.depth.stages[k], (aux[:count].clone(),)))
                    calls[k].append((self.fusions[k], (r[:count].clone(), a)))
                    r = torch.cat([self.fusions[k](r[:count], a), r[count:]])
                main, aux = r, a
                outputs.append(r)

        def run() -> list[Tensor]:
            if self.setting.training:
                return self._bare_step([call for stage in calls for call in stage], outputs)
            net.stems(self.rgb, self.depth)
            self.gate(*gate_inputs)
            kept = []
            for stage in calls:
                for module, arguments in stage:
                    made = module(*arguments)
                kept.append(made)
            return [net.decode(outputs)]

        return run

    def _bare_step(self, calls: list, outputs: list[Tensor]) -> list[Tensor]:
        self.forget_gradients()
        main, aux = self.net.stems(self.rgb, self.depth)
        made = [main, aux]
        for module, arguments in calls:
            made.append(module(*(x.requires_grad_() for x in arguments)))
        leaves = [x.requires_grad_() for x in outputs]
        loss = self.loss(self.net.decode(leaves))
        torch.autograd.backward([loss, *made], [None, *map(torch.ones_like, made)])
        for _, arguments in calls:
            for x in arguments:
                x.grad = None
        for x in leaves:
            x.grad = None
        return [loss.detach()]

    def loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.target)

    def forget_gradients(self) -> None:
        for parameter in self.net.parameters():
            parameter.grad = None

    def rows(self) -> dict[str, Row]:
        """Forwards, or Stage-I steps; memory is counted where routed is compared with masked."""

        def row(forward: Callable[[], Tensor]) -> Callable[[], Any]:
            def step() -> None:
                self.forget_gradients()
                self.loss(forward()).backward()

            return step if self.setting.training else forward

        def peak(call: Callable[[], Any]) -> dict[str, Callable[[], int]]:
            def count() -> int:
                self.forget_gradients()
                return peak_bytes(call, self.setting.device)

            return {"peak": count}

        masked, routed = row(self.masked), row(self.routed)
        costs = stack_costs(self.setting.kind, self.setting.height)
        limit = costs.ceiling(self.paths.cpu(), self.setting.training)
        return {
            "static": Row(row(self.static)),
            "masked": Row(masked, memory=peak(masked)),
            "routed": Row(routed, compares_to="bare", ceiling=limit, memory=peak(routed)),
            "bare": Row(self.bare()),
        }

    def error(self) -> float:
        """The distance of routed from masked, relative to masked: output or all gradients."""

        def result(forward: Callable[[], Tensor]) -> Tensor:
            self.forget_gradients()
            output = forward()
            if not self.setting.training:
                return output.flatten()
            self.loss(output).backward()
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            return torch.cat([gradient.flatten() for gradient in gradients])

        ours, theirs = result(self.routed), result(self.masked)
        self.forget_gradients()
        return float((ours - theirs).norm() / theirs.norm())


def contest(setting: StackSetting) -> Contest:
    """Rows in one dtype; tests/project/test_nyud.py compares in fp64."""
    problem = StackProblem(setting)
    errors = dict.fromkeys(ROWS, problem.error())
    return Contest(problem.rows(), errors, TOLERANCE[setting.dtype], setting.device)
