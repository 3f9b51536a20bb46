"""Options, the cache of contests, and the summary at the end."""

import itertools
import os

import pytest
import torch

from benchmarks.contest import Outcome, run_contest
from benchmarks.memory import keep_heap
from benchmarks.nested import StackSetting
from benchmarks.problem import Setting
from benchmarks.stack_contest import StackOutcome
from benchmarks.summary import STACK_COLUMNS, STACK_LEGEND, stack_rows, summary_rows, table
from benchmarks.timing import FULL, ONCE, QUICK, replay
from benchmarks.workloads import WORKLOADS
from dynmm_kernels import __version__, ops

OUTCOMES = pytest.StashKey[dict[Setting, Outcome]]()
STACKS = pytest.StashKey[dict[StackSetting, StackOutcome]]()
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
    config.stash[STACKS] = {}
    config.stash[HEAP_KEPT] = keep_heap()
    if not any(arg.startswith("--benchmark-columns") for arg in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]
    # fp32 means fp32, also in cuDNN's convolutions.
    torch.backends.cudnn.allow_tf32 = False


def pytest_report_header(config):
    kernels = ops.compiled.reason or f"compiled, sources {ops.compiled.build_info.sources}"
    heap = "kept" if config.stash[HEAP_KEPT] else "as the C library has it"
    return f"dynmm_kernels {__version__}: kernels: {kernels}; freed memory: {heap}"


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
    """Tests that take ``contest`` and ``row`` get every row (ROWS of their module) of a group."""
    if "contest" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    rows = [
        row for row in metafunc.module.ROWS if row != "masked_compiled" or option("bench_compile")
    ]
    metafunc.parametrize(
        ("workload", "n", "p", "row"),
        [
            pytest.param(name, n, p, row, id=f"{name}-N{n}-p{p:g}-{row}")
            for name, n, p in groups(metafunc.module.TRAINING, option("full"))
            for row in rows
        ],
    )


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
def contest(request, workload, n, p, effort, device) -> Outcome:
    """The measured group, run for its first row and kept for the others."""
    dtype = getattr(torch, request.config.getoption("bench_dtype"))
    compiled = request.config.getoption("bench_compile") and not request.module.TRAINING
    setting = Setting(workload, n, p, request.module.TRAINING, device, dtype, compiled)
    outcomes = request.config.stash[OUTCOMES]
    if setting not in outcomes:
        outcomes[setting] = run_contest(setting, effort)
    return outcomes[setting]


@pytest.fixture
def report(benchmark, contest, row):
    """Fails for a wrong row; else hands its times and figures to pytest-benchmark."""

    def hand_over():
        if not contest.passed(row):
            pytest.fail(f"{row}: relative error {contest.errors[row]:.1e} against fp64; not timed")
        benchmark.group = str(contest.setting)
        benchmark.extra_info.update(contest.info(row))
        replay(benchmark, contest.seconds[row])

    return hand_over


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
    output_json["summary"] = summary_rows(config.stash[OUTCOMES].values())
    output_json["stacks"] = stack_rows(config.stash[STACKS])


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("benchmark_disable"):
        return
    sections = {
        "routing": table(summary_rows(config.stash[OUTCOMES].values())),
        "nested stacks": table(stack_rows(config.stash[STACKS]), STACK_COLUMNS, STACK_LEGEND),
    }
    for title, lines in sections.items():
        if lines:
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)
