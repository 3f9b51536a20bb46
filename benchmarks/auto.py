"""`execution="auto"` against the better of masked and routed, over batch sizes and shares.

    python -m benchmarks.auto --workloads trivial imdb --batches 1 32 --seconds 5 -o auto.json

One line per cell: microseconds of each row, and the median over rounds of auto / better. "plain" is
masked execution without this library. A cell that misses 1.03 is marked.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import torch

from benchmarks import baselines
from benchmarks.problem import Problem, Runs, Setting, routed_fusion
from benchmarks.workloads import WORKLOADS
from dynmm_kernels.measure.memory import keep_heap
from dynmm_kernels.measure.timing import Effort, interleave

PAPER = {"trivial": 0.25, "imdb": 0.036, "mosei": 0.164}
BATCHES = (1, 2, 8, 32, 128)
LIMIT = 1.03


def calls(problem: Problem) -> Runs:
    """Row -> a forward, or a training step without the optimizer."""
    training, x = problem.setting.training, problem.x
    forwards: Runs = {"plain": lambda: baselines.masked(problem.gate, problem.experts, x)}
    for execution in ("masked", "routed"):
        fusion = routed_fusion(problem.gate, problem.experts, execution=execution)
        fusion.training = training  # of the parts it was set
        forwards[execution] = lambda fusion=fusion: fusion(x)
    forwards["auto"] = lambda: problem.auto(x)
    if not training:
        return forwards
    loss = WORKLOADS[problem.setting.workload].loss

    def step(forward) -> None:
        problem.forget_gradients()
        loss(forward(), problem.target).backward()

    return {row: lambda forward=forward: step(forward) for row, forward in forwards.items()}


def measure(setting: Setting, effort: Effort) -> dict[str, object]:
    problem = Problem.build(setting)
    runs = calls(problem)
    with torch.set_grad_enabled(setting.training):
        for _ in range(20):  # what it takes to learn
            runs["auto"]()
        seconds = interleave(runs, effort, setting.device)
    middle = {row: median(times) for row, times in seconds.items()}
    better = min(("masked", "routed"), key=middle.__getitem__)
    ratio = median(a / b for a, b in zip(seconds["auto"], seconds[better], strict=True))
    chosen = problem.auto.chooser
    return {
        "cell": str(setting),
        **{row: 1e6 * time for row, time in middle.items()},
        "better": better,
        "ratio": ratio,
        "rounds": len(seconds["auto"]),
        "last": chosen.last if isinstance(chosen.last, str) else None,
    }


def line(row: dict[str, object]) -> str:
    times = "  ".join(f"{name} {row[name]:9.1f}" for name in ("plain", "masked", "routed", "auto"))
    miss = "  MISSED" if row["ratio"] > LIMIT else ""
    return f"{row['cell']:34} {times}  auto/{row['better']} {row['ratio']:.3f}{miss}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=[*PAPER], choices=[*PAPER])
    parser.add_argument("--batches", nargs="+", type=int, default=[*BATCHES])
    parser.add_argument("--kinds", nargs="+", default=["eval", "training"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="of each cell")
    parser.add_argument("-o", "--output", type=Path, help="for JSON, a line for each cell")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_heap()
    # Several calls at a time: the first one pays for what the contestant before did to the caches.
    effort = Effort(seconds=given.seconds, rounds=(9, 400), sample=5e-3)
    for name in given.workloads:
        for n in given.batches:
            splits = {round(p * n): p for p in (0.0, PAPER[name], 0.5, 1.0)}
            for kind in given.kinds:
                for p in splits.values():
                    row = measure(Setting(name, n, p, kind == "training", given.device), effort)
                    print(line(row), flush=True)
                    if given.output:
                        with given.output.open("a") as file:
                            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
