"""One group of the nested benchmark: checked, timed together, its memory counted."""

from dataclasses import dataclass, field
from statistics import median

import torch

from benchmarks.memory import peak_bytes
from benchmarks.nested import StackProblem, StackSetting, stack_costs
from benchmarks.timing import Effort, interleave

ROWS = ("static", "masked", "routed", "bare")
TOLERANCE = 1e-4  # fp32; tests/project/test_nyud.py compares in fp64


@dataclass
class StackOutcome:
    error: float
    ceiling: float
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    def ratio(self, slow: str, fast: str) -> float:
        """Median over rounds of the two rows' quotient."""
        rounds = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return median(a / b for a, b in rounds)

    def info(self) -> dict[str, float]:
        """What goes beside the times of the routed row."""
        realised = self.ratio("masked", "routed")
        return {
            "routed_s": median(self.seconds["routed"]),
            "masked_s": median(self.seconds["masked"]),
            "realised": realised,
            "ceiling": self.ceiling,
            "realised_over_ceiling": realised / self.ceiling,
            "overhead": self.ratio("routed", "bare"),
            "static_over_routed": self.ratio("static", "routed"),
            "peak_over_masked": self.peak["routed"] / self.peak["masked"],
        }


def run_stack_contest(setting: StackSetting, effort: Effort) -> StackOutcome:
    with torch.set_grad_enabled(setting.training):
        problem = StackProblem(setting)
        costs = stack_costs(setting.kind, setting.height)
        outcome = StackOutcome(
            problem.error(), costs.ceiling(problem.paths.cpu(), setting.training)
        )
        if not outcome.error <= TOLERANCE:  # nor where it is nan
            return outcome
        runs = problem.runs()
        outcome.seconds = interleave(runs, effort, setting.device)
        for row in ("masked", "routed"):
            problem.forget_gradients()
            outcome.peak[row] = peak_bytes(runs[row], setting.device)
    return outcome
