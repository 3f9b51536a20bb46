"""`execution="auto"` against the better of masked and routed, over batch sizes and shares.

    python -m benchmarks.auto --workloads trivial imdb --batches 1 32 --seconds 5 -o auto.json

One line per cell: microseconds of each row, and the median over rounds of auto / better. "plain" is
masked execution without this library; R50 is a NestedFusion, without what is around it. A cell that
misses 1.03 is marked.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks import baselines
from benchmarks.nested import StackProblem, StackSetting
from benchmarks.problem import Problem, Runs, Setting, routed_fusion
from benchmarks.workloads import WORKLOADS
from dynmm_kernels.measure.memory import keep_heap
from dynmm_kernels.measure.timing import Effort, interleave
from dynmm_kernels.nn.adaptive import Adaptive
from dynmm_kernels.nn.chooser import Chooser

SHARES = {"trivial": 0.25, "imdb": 0.036, "mosei": 0.164}  # the paper's
MIXES = ("all-0", "a", "uniform", "all-4")
BATCHES = (1, 2, 8, 32, 128)
LIMIT = 1.03


class Cell(NamedTuple):
    """Row -> a forward, or a training step without the optimizer; and the fusion that learns."""

    name: str
    runs: Runs
    auto: Adaptive


def routed_cell(setting: Setting) -> Cell:
    problem = Problem.build(setting)
    training, x = setting.training, problem.x
    forwards: Runs = {"plain": lambda: baselines.masked(problem.gate, problem.experts, x)}
    for execution in ("masked", "routed"):
        fusion = routed_fusion(problem.gate, problem.experts, execution=execution)
        fusion.training = training  # of the parts it was set
        forwards[execution] = lambda fusion=fusion: fusion(x)
    forwards["auto"] = lambda: problem.auto(x)
    loss = WORKLOADS[setting.workload].loss
    runs = stepping(forwards, problem, lambda y: loss(y, problem.target)) if training else forwards
    return Cell(str(setting), runs, problem.auto)


def stack_cell(setting: StackSetting) -> Cell:
    """NestedFusion alone, between what feeds it and the decoder."""
    problem = StackProblem(setting)
    with torch.no_grad():
        inputs = problem.net.stems(problem.rgb, problem.depth)
    nested = {how: copy.copy(problem.nested) for how in ("masked", "routed", "auto")}
    for execution, fusion in nested.items():
        fusion.execution, fusion.training = execution, setting.training
    nested["auto"].chooser = Chooser()
    forwards = {how: lambda fusion=fusion: fusion(*inputs) for how, fusion in nested.items()}
    runs = stepping(forwards, problem, torch.sum) if setting.training else forwards
    return Cell(str(setting).replace("Stage-I", "training"), runs, nested["auto"])


def stepping(forwards: Runs, problem: Problem | StackProblem, loss: Callable) -> Runs:
    def step(forward: Callable) -> None:
        problem.forget_gradients()
        loss(forward()).backward()

    return {row: lambda forward=forward: step(forward) for row, forward in forwards.items()}


def measure(cell: Cell, training: bool, device: str, seconds: float) -> dict[str, object]:
    # Several calls at a time: the first one pays for what the contestant before did to the caches.
    effort = Effort(seconds=seconds, rounds=(9, 400), sample=5e-3)
    with torch.set_grad_enabled(training):
        until = time.perf_counter() + seconds / 5
        calls = 0
        while calls < 20 or (calls < 2000 and time.perf_counter() < until):  # to learn
            cell.runs["auto"]()
            calls += 1
        times = interleave(cell.runs, effort, device)
    better = min(("masked", "routed"), key=lambda row: median(times[row]))
    why = cell.auto.chooser.last
    return {
        "cell": cell.name,
        **{row: 1e6 * median(its) for row, its in times.items()},
        "better": better,
        "ratio": median(a / b for a, b in zip(times["auto"], times[better], strict=True)),
        "rounds": len(times["auto"]),
        "no_choice": why if isinstance(why, str) else None,
    }


def line(row: dict[str, object]) -> str:
    rows = [name for name in ("plain", "masked", "routed", "auto") if name in row]
    times = "  ".join(f"{name} {row[name]:9.1f}" for name in rows)
    miss = "  MISSED" if row["ratio"] > LIMIT else ""
    return f"{row['cell']:42} {times}  auto/{row['better']} {row['ratio']:.3f}{miss}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=[*SHARES, "R50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[*BATCHES])
    parser.add_argument("--kinds", nargs="+", default=["forward", "training"])
    parser.add_argument("--height", type=int, default=96, help="of the images of R50 and R34")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="of each cell")
    parser.add_argument("-o", "--output", type=Path, help="for JSON, a line for each cell")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_heap()
    for name, n, kind in product(given.workloads, given.batches, given.kinds):
        training, device = kind == "training", given.device
        if name in SHARES:
            shares = {round(p * n): p for p in (0.0, SHARES[name], 0.5, 1.0)}.values()
            cells = (routed_cell(Setting(name, n, p, training, device)) for p in shares)
        else:
            cells = (
                stack_cell(StackSetting(name, n, given.height, mix, training, device))
                for mix in (MIXES if n > 1 else MIXES[::3])
            )
        for cell in cells:
            row = measure(cell, training, device, given.seconds)
            print(line(row), flush=True)
            if given.output:
                with given.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
