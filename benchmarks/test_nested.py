"""A stack of four fused stages inside a segmentation net (DynMM on NYU Depth V2).

Inference, and the Stage-I training step: a random policy, so that no gate learns.
"""

from dataclasses import dataclass, field, replace
from statistics import median

import pytest
import torch

from benchmarks.memory import peak_bytes
from benchmarks.nested import StackProblem, StackSetting, stack_costs
from benchmarks.nyud import MIXES
from benchmarks.timing import interleave, replay

ROWS = ("static", "masked", "routed", "bare")
TOLERANCE = 1e-3  # fp32, of gradients summed over whole images; tests/test_nyud.py is exact

QUICK = [
    *(("R50", 4, 96, mix, False) for mix in ("a", "all-0")),
    ("R34", 4, 96, "uniform", False),
    ("R50", 4, 96, "uniform", True),
]
FULL = [
    *(("R50", n, size, mix, False) for size in (240, 480) for n in (4, 8) for mix in MIXES),
    *(("R34", n, 480, mix, False) for n in (1, 8) for mix in MIXES),
    *(("R50", 8, 240, mix, True) for mix in ("uniform", "a")),
]


@dataclass
class Race:
    error: float
    ceiling: float
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    def ratio(self, slow: str, fast: str) -> float:
        rounds = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return median(a / b for a, b in rounds)


@pytest.fixture(scope="module")
def races():
    return {}


def pytest_generate_tests(metafunc):
    groups = FULL if metafunc.config.getoption("full") else QUICK
    cases = [(StackSetting(*group), row) for group in groups for row in ROWS]
    metafunc.parametrize(("setting", "row"), cases, ids=lambda value: str(value).replace(" ", "-"))


def run_race(setting: StackSetting, effort) -> Race:
    with torch.set_grad_enabled(setting.training):
        problem = StackProblem(setting)
        ceiling = stack_costs(setting.kind, setting.height).ceiling(
            problem.paths.cpu(), setting.training
        )
        race = Race(problem.error(), ceiling)
        runs = problem.runs()
        fewest, most = effort.rounds  # one round takes up to half a minute
        effort = replace(effort, rounds=(min(fewest, 4), most))
        race.seconds = interleave(runs, effort, setting.device)
        race.peak = {row: peak_bytes(runs[row], setting.device) for row in ("masked", "routed")}
    return race


@pytest.mark.benchmark(timer=replay.now)
def test_nested(benchmark, races, setting, row, effort):
    if setting not in races:
        races[setting] = run_race(setting, effort)
    race = races[setting]
    assert race.error <= TOLERANCE, f"routed differs from masked by {race.error:.1e}; not timed"
    benchmark.group = str(setting)
    benchmark.extra_info.update(row=row, setting=str(setting), error=race.error)
    if row == "routed":
        realised = race.ratio("masked", "routed")
        benchmark.extra_info.update(
            realised=realised,
            ceiling=race.ceiling,
            realised_over_ceiling=realised / race.ceiling,
            overhead=race.ratio("routed", "bare"),
            static_over_routed=race.ratio("static", "routed"),
            peak_over_masked=race.peak["routed"] / race.peak["masked"],
        )
    replay(benchmark, race.seconds[row])
