"""QMF: cascades over its models, its fusion of logits, its history and ranking loss."""

import itertools
import re

import pytest
import torch

from benchmarks import cascade, energy, history
from benchmarks.cascade import CascadeSetting
from benchmarks.energy import EnergySetting
from benchmarks.history import HistorySetting
from benchmarks.replay import replayed

# (pair, samples, share that leaves early). Fewer than 16: on the CPU torch hands larger batches of
# 3x3 convolutions to NNPACK, which needs fewer multiplications than a ceiling counts, and the
# samples that stay would be too few for it.
CASCADES = (
    *(("text-image", 12, p) for p in (0.5, 0.86, 1.0)),
    *(("text-image", n, 0.0) for n in (4, 1)),
    ("text-image", 1, 1.0),
    ("rgb-d", 12, 0.5),
)
ALL_CASCADES = (
    *itertools.product(["text-image"], (1, 16, 64, 256), (0.0, 0.5, 0.86, 0.95, 1.0)),
    *itertools.product(["rgb-d"], (1, 128, 256), (0.0, 0.25, 0.5, 0.75, 1.0)),
)
SIZES = ((16, 101), (256, 101), (65536, 10), (65536, 101))  # (samples, classes)
ALL_SIZES = tuple(itertools.product((16, 256, 4096, 65536), (3, 10, 101, 1000)))
SAMPLES = (795, 1_000_000)
ALL_SAMPLES = (795, 1555, 60_000, 1_000_000)


def cascades(option):
    """In the paper's size on a GPU and in the full profile."""
    full, device = option("full"), option("bench_device")
    shortened = not full and not device.startswith("cuda")
    dtype, seen = getattr(torch, option("bench_dtype")), set()
    for pair, n, p in ALL_CASCADES if full else CASCADES:
        if (pair, n, round(p * n)) not in seen:
            seen.add((pair, n, round(p * n)))
            yield CascadeSetting(pair, n, p, shortened, device, dtype)


def fusions(option):
    sizes = ALL_SIZES if option("full") else SIZES
    dtype, compiled = getattr(torch, option("bench_dtype")), option("bench_compile")
    for step, size in itertools.product(energy.STEPS, sizes):
        yield EnergySetting(*size, step, option("bench_device"), dtype, compiled)


def histories(option):
    for samples in ALL_SAMPLES if option("full") else SAMPLES:
        yield HistorySetting(samples, device=option("bench_device"))


def pytest_generate_tests(metafunc):
    """Every row of every setting."""
    option = metafunc.config.getoption
    settings, rows = {
        test_cascade: (cascades, cascade.ROWS),
        test_energy_fuse: (fusions, energy.ROWS),
        test_history: (histories, history.ROWS),
    }[metafunc.function]
    rows = [row for row in rows if row != "torch_compiled" or option("bench_compile")]
    cases = [
        pytest.param(setting, row, id=re.sub(r"[^\w=.]+", "-", f"{setting} {row}"))
        for setting, row in itertools.product(settings(option), rows)
    ]
    metafunc.parametrize(("setting", "row"), cases)


@replayed
def test_cascade(race, setting, row):
    """Eval mode, no graph."""
    with torch.no_grad():
        race(setting, row, lambda: cascade.contest(setting))


@replayed
def test_energy_fuse(race, setting, row):
    race(setting, row, lambda: energy.contest(setting))


@replayed
def test_history(race, setting, row):
    race(setting, row, lambda: history.contest(setting))
