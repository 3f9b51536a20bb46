"""A stack of four fused stages inside a segmentation net (DynMM on NYU Depth V2).

Inference, and the Stage-I training step: a random policy, so that no gate learns.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.nested import ROWS, StackSetting, contest
from benchmarks.nyud import MIXES
from benchmarks.replay import replayed

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


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    groups = FULL if option("full") else QUICK
    settings = [StackSetting(*group, device=option("bench_device")) for group in groups]
    cases = [(setting, row) for setting in settings for row in ROWS]
    metafunc.parametrize(("setting", "row"), cases, ids=lambda value: str(value).replace(" ", "-"))


@pytest.fixture(scope="session")
def effort(request, effort):
    """Four rounds unless asked for more: one takes up to half a minute."""
    if request.config.getoption("bench_rounds") is not None:
        return effort
    fewest, most = effort.rounds
    return replace(effort, rounds=(min(fewest, 4), most))


@replayed
def test_nested(race, setting, row):
    with torch.set_grad_enabled(setting.training):
        race(setting, row, lambda: contest(setting))
