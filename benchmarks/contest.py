"""One group of a benchmark: a workload, a batch size, a gate probability; all rows interleaved.

``run_contest`` builds every row from the same weights, checks each against fp64, drops the wrong
ones, times the others together and counts their memory.
"""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.baselines import Bare
from benchmarks.ceilings import ceiling
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.problem import Problem, Setting
from benchmarks.reference import (
    TOLERANCE,
    gradient_vectors,
    reference_gradients,
    reference_outputs,
    relative_error,
)
from benchmarks.timing import Effort, interleave
from benchmarks.workloads import WORKLOADS

# Row -> the kind of blend it must agree with (see reference.py).
FORWARD_ROWS = {
    "static_e1": "static_e1",
    "static_e2": "static_e2",
    "dense": "dense",
    "masked": "masked",
    "masked_compiled": "masked",
    "loop": "masked",
    "routed": "masked",
    "bare": "masked",
}
TRAINING_ROWS = {
    "static_e1": "static_e1",
    "static_e2": "static_e2",
    "dense": "dense",
    "masked": "masked",
    "loop": "selected",
    "routed": "masked",
    "routed_selected": "selected",
    "bare": "masked",
    "bare_selected": "selected",
}


@dataclass
class Outcome:
    setting: Setting
    counts: tuple[int, ...]
    errors: dict[str, float]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)

    def passed(self, row: str) -> bool:
        return self.errors[row] <= TOLERANCE[self.setting.dtype]

    def milliseconds(self, row: str) -> float:
        return 1e3 * median(self.seconds[row])

    def ratio(self, slow: str, fast: str) -> float | None:
        """Median over rounds of the two rows' quotient: a slow moment hits both."""
        if slow not in self.seconds or fast not in self.seconds:
            return None
        rounds = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return median(a / b for a, b in rounds)

    def gate_grad(self, row: str) -> str | None:
        if not self.setting.training:
            return None
        return "selected" if TRAINING_ROWS[row] == "selected" else "straight_through"

    def info(self, row: str) -> dict[str, Any]:
        """What goes beside the times of one row."""
        setting = self.setting
        costs = WORKLOADS[setting.workload].costs
        info: dict[str, Any] = {
            "workload": setting.workload,
            "kind": "training" if setting.training else "forward",
            "n": setting.n,
            "p": setting.p,
            "row": row,
            "counts": self.counts,
            "macs_gate": costs.gate,
            "macs_branches": costs.branches,
            "device": setting.device,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "error": self.errors[row],
            "peak_mb": self.peak[row] / 1e6,
            "realised": self.ratio("masked", row),
        }
        if setting.training:
            info["saved_mb"] = self.saved[row] / 1e6
        if row.startswith(("routed", "loop", "bare")):
            info["ceiling"] = ceiling(costs, self.counts, self.gate_grad(row))
            if info["realised"] is not None:
                info["realised_over_ceiling"] = info["realised"] / info["ceiling"]
        if row.startswith("routed"):
            info["overhead"] = self.ratio(row, row.replace("routed", "bare"))
            same_gradient = self.gate_grad(row) == self.gate_grad("loop")
            info["loop_over_routed"] = self.ratio("loop", row) if same_gradient else None
        return info


def forward_errors(problem: Problem) -> dict[str, float]:
    exact = problem.double()
    references = reference_outputs(exact.gate, exact.experts, exact.x, problem.setting.n)
    bare = Bare.prepare(problem.gate, problem.experts, problem.x, problem.choice)
    errors = {}
    for row, run in problem.forwards().items():
        output, reference = run(), references[FORWARD_ROWS[row]]
        if row == "bare":
            output = torch.cat(output)
            reference = torch.cat([reference[rows] for _, _, rows in bare.selected])
        errors[row] = relative_error(output, reference)
    return errors


def training_errors(problem: Problem) -> dict[str, float]:
    """The worst of the gradients' errors; the gate's does not count for the bare calls."""
    exact = problem.double()
    loss = WORKLOADS[problem.setting.workload].loss
    references = reference_gradients(exact.gate, exact.experts, exact.x, exact.target, loss)
    errors = {}
    for row, step in problem.steps().items():
        step()
        gradients = gradient_vectors(problem.gate, problem.experts)
        if row.startswith("bare"):
            del gradients["gate"]
        reference = references[TRAINING_ROWS[row]]
        errors[row] = max(relative_error(g, reference[part]) for part, g in gradients.items())
    return errors


def run_contest(setting: Setting, effort: Effort) -> Outcome:
    """Checks without dropout (draws differ between rows), times with the paper's."""
    with torch.set_grad_enabled(setting.training):
        checked = Problem.build(setting, dropout=0.0)
        counts = tuple(torch.bincount(checked.choice, minlength=2).tolist())
        errors = training_errors(checked) if setting.training else forward_errors(checked)
        outcome = Outcome(setting, counts, errors)
        del checked

        problem = Problem.build(setting)
        runs = problem.steps() if setting.training else problem.forwards()
        runs = {row: run for row, run in runs.items() if outcome.passed(row)}
        outcome.seconds = interleave(runs, effort, setting.device)
        for row, run in runs.items():
            problem.forget_gradients()
            outcome.peak[row] = peak_bytes(run, setting.device)
        if setting.training:
            known = problem.parameters() + tree_leaves(problem.x)
            losses = problem.losses()
            outcome.saved = {row: saved_bytes(losses[row], known) for row in runs}
    return outcome
