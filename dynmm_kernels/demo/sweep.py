"""The sweep: what a digit may cost, against what that buys.

For every seed the branches are trained once. From there the gate is trained with several weights of
the resource loss, each time twice: by masked execution, as the paper's code does it, and by routed
execution. Both must trace the same curve of accuracy against cost; beside it stand the branches
alone and the soft gate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..nn import RoutedFusion
from .bench import ROUNDS, Bench
from .digits import BRANCHES, TOGETHER, Digits, build, load_digits, one_thread, train, views
from .report import OTHER, ROUTED, Row

EPOCHS = 10
COST_WEIGHTS = (0.01, 0.03, 0.07, 0.15, 0.4)
SEEDS = 2


@dataclass(frozen=True)
class Point:
    """One trained model, run one way on the test set."""

    seed: int
    cost_weight: float | None  # None: a branch alone
    trained: str  # "masked" or "routed"
    row: Row


def sweep(
    epochs: int,
    seeds: Sequence[int],
    cost_weights: Sequence[float] = COST_WEIGHTS,
    rounds: int = ROUNDS,
    advance: Callable[[str], None] = lambda text: None,
) -> list[Point]:
    """All models; for each, the rows of the demo's table that say something new."""
    points = []
    for seed in seeds:
        digits = load_digits(seed)
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(seed)
            start = build(views(digits.test_images[:8]))
            generator = torch.Generator().manual_seed(seed)
            train(start, digits, epochs, generator, advance, [BRANCHES])
        for mode in ("static E1", "static E2"):
            points.append(Point(seed, None, "routed", _row(start, digits, mode, rounds)))
        for weight in cost_weights:
            for execution in ("masked", "routed"):
                fusion = copy.deepcopy(start)
                fusion.execution = execution
                with one_thread():
                    train(fusion, digits, epochs, _copy(generator), advance, [TOGETHER], weight)
                points.append(
                    Point(seed, weight, execution, _row(fusion, digits, "routed", rounds))
                )
                if execution == "routed":
                    row = _row(fusion, digits, "dense", rounds)
                    points.append(Point(seed, weight, execution, row))
    return points


def _copy(generator: torch.Generator) -> torch.Generator:
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    return twin


def _row(fusion: RoutedFusion, digits: Digits, mode: str, rounds: int) -> Row:
    bench = Bench(fusion, digits)
    return bench.row(mode, bench.times(rounds, lambda text: None, (mode, "masked")))


def pairs(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """(masked, routed) of every seed and weight: the same training but for the execution."""
    hard = {(p.seed, p.cost_weight, p.trained): p for p in points if p.row.mode == "routed"}
    return [
        (point, hard[seed, weight, "routed"])
        for (seed, weight, trained), point in hard.items()
        if trained == "masked"
    ]


def table(points: Sequence[Point]) -> str:
    head = (
        f"{'cost weight':>11} {'seed':>4} {'run':>10} {'trained':>8} {'accuracy':>9} "
        f"{'E2 share':>9} {'MMACs':>7} {'time':>9}"
    )
    lines = [head, "-" * len(head)]
    for p in points:
        weight = "-" if p.cost_weight is None else f"{p.cost_weight:g}"
        trained = "-" if p.cost_weight is None else p.trained
        lines.append(
            f"{weight:>11} {p.seed:>4} {p.row.mode:>10} {trained:>8} {p.row.accuracy:7.1f} % "
            f"{100 * p.row.shares[1]:7.1f} % {p.row.macs:7.3f} {p.row.time_ms:6.1f} ms"
        )
    both = pairs(points)
    accuracy = max(abs(a.row.accuracy - b.row.accuracy) for a, b in both)
    macs = max(abs(a.row.macs - b.row.macs) / a.row.macs for a, b in both)
    lines += [
        "",
        f"Trained masked against trained routed, {len(both)} pairs: accuracy differs by at most "
        f"{accuracy:.2f} points, executed cost by {100 * macs:.1f} %.",
    ]
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path) -> bool:
    """Accuracy against executed cost and against time; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    by_cost, by_time = figure.subplots(1, 2, sharey=True)
    both = pairs(points)
    kinds = (
        ("trained masked, run routed", [m for m, _ in both], {"s": 60, "marker": "o"}, False),
        ("trained routed, run routed", [r for _, r in both], {"s": 12, "marker": "o"}, True),
        ("a branch alone", [p for p in points if p.cost_weight is None], {"marker": "s"}, True),
        ("soft gate", [p for p in points if p.row.mode == "dense"], {"marker": "^"}, False),
    )
    for label, chosen, style, filled in kinds:
        colour = ROUTED if "trained" in label else OTHER
        face = colour if filled else "none"
        accuracy = [p.row.accuracy for p in chosen]
        for axes, spent in (
            (by_cost, [p.row.macs for p in chosen]),
            (by_time, [p.row.time_ms for p in chosen]),
        ):
            axes.scatter(spent, accuracy, label=label, edgecolors=colour, facecolors=face, **style)
    by_cost.set_xlabel("executed MMACs per digit")
    by_time.set_xlabel("time for the test set, ms")
    by_cost.set_ylabel("test accuracy, %")
    by_cost.legend(frameon=False, fontsize="small", loc="lower right")
    for axes in (by_cost, by_time):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
    figure.suptitle("What a digit may cost, and what that buys", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    return True
