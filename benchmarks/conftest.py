"""Options, the contests of a session, and the summary at the end."""

import functools
import os

import pytest
import torch

from benchmarks import contest
from benchmarks.summary import (
    STACK_COLUMNS,
    STACK_LEGEND,
    qmf_rows,
    qmf_tables,
    stack_rows,
    summary_rows,
    table,
)
from dynmm_kernels import __version__, ops
from dynmm_kernels.measure.memory import keep_heap
from dynmm_kernels.measure.timing import FULL, ONCE, QUICK

OUTCOMES = pytest.StashKey[contest.Outcomes]()
HEAP_KEPT = pytest.StashKey[bool]()


def pytest_addoption(parser):
    group = parser.getgroup("dynmm_kernels benchmarks")
    group.addoption("--full", action="store_true", help="the whole table; best on a GPU")
    group.addoption("--bench-compile", action="store_true", help="add masked under torch.compile")
    group.addoption("--bench-rounds", type=int, help="at least so many interleaved rounds")
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption(
        "--bench-dtype", default="float32", choices=["float64", "float32", "float16", "bfloat16"]
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[OUTCOMES] = {}
    config.stash[HEAP_KEPT] = keep_heap()
    if not any(arg.startswith("--benchmark-columns") for arg in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]
    # fp32 means fp32, also in cuDNN's convolutions.
    torch.backends.cudnn.allow_tf32 = False


def pytest_report_header(config):
    kernels = ops.compiled.reason or f"compiled, sources {ops.compiled.build_info.sources}"
    heap = "kept" if config.stash[HEAP_KEPT] else "as the C library has it"
    return f"dynmm_kernels {__version__}: kernels: {kernels}; freed memory: {heap}"


@pytest.fixture(scope="session")
def effort(request):
    if request.config.getoption("benchmark_disable"):
        return ONCE
    profile = FULL if request.config.getoption("full") else QUICK
    fewest = request.config.getoption("bench_rounds")
    return profile if fewest is None else profile.at_least(fewest)


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("bench_device")


@pytest.fixture
def race(request, benchmark, effort):
    """`race(setting, row, contest)`: see contest.py."""
    return functools.partial(contest.race, request.config.stash[OUTCOMES], benchmark, effort)


def pytest_benchmark_update_machine_info(config, machine_info):
    """Which kernels ran, and whether freed memory stayed with the process."""
    build = ops.compiled.build_info
    machine_info["torch"] = torch.__version__
    machine_info["heap_kept"] = config.stash[HEAP_KEPT]
    machine_info["dynmm_kernels"] = {
        "version": __version__,
        "kernels": ops.compiled.reason or "compiled",
        "sources": build.sources if build else None,
        "requested": os.environ.get("DYNMM_BACKEND"),
    }


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["summary"] = summary_rows(config.stash[OUTCOMES])
    output_json["stacks"] = stack_rows(config.stash[OUTCOMES])
    output_json["qmf"] = qmf_rows(config.stash[OUTCOMES])


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("benchmark_disable"):
        return
    sections = {
        "routing": table(summary_rows(config.stash[OUTCOMES])),
        "nested stacks": table(stack_rows(config.stash[OUTCOMES]), STACK_COLUMNS, STACK_LEGEND),
        "qmf": qmf_tables(config.stash[OUTCOMES]),
    }
    for title, lines in sections.items():
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)
