"""Two published models and a trivial one: every way to run them, inference and training."""

import itertools

import pytest
import torch

from benchmarks.problem import FORWARD, TRAINING, Setting, contest
from benchmarks.replay import replayed
from benchmarks.workloads import WORKLOADS


def groups(training: bool, full: bool):
    """(workload, n, p), leaving out a probability that gives the same plan as an earlier one."""
    for name, workload in WORKLOADS.items():
        if not full:
            pairs = workload.quick_training if training else workload.quick
        else:
            pairs = itertools.product(workload.batches, workload.probabilities)
        seen = set()
        for n, p in pairs:
            if (n, round(p * n)) not in seen:
                seen.add((n, round(p * n)))
                yield name, n, p


def pytest_generate_tests(metafunc):
    """Every row of every group."""
    option = metafunc.config.getoption
    training = metafunc.function is test_training
    compiled = option("bench_compile") and not training
    names = TRAINING if training else FORWARD
    rows = [row for row in names if compiled or row != "masked_compiled"]
    dtype = getattr(torch, option("bench_dtype"))
    cases = []
    for name, n, p in groups(training, option("full")):
        setting = Setting(name, n, p, training, option("bench_device"), dtype, compiled)
        cases += [pytest.param(setting, r, id=f"{name}-N{n}-p{p:g}-{r}") for r in rows]
    metafunc.parametrize(("setting", "row"), cases)


@replayed
def test_forward(race, setting, row):
    """Eval mode, no graph."""
    with torch.no_grad():
        race(setting, row, lambda: contest(setting))


@replayed
def test_training(race, setting, row):
    """One step without its optimizer: zero_grad, forward, loss, backward.

    Batch norm (E2 of imdb) is frozen, dropout is the paper's.
    """
    race(setting, row, lambda: contest(setting))
