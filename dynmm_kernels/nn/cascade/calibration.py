"""Thresholds at which samples may leave a cascade, with a guarantee on what that does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from . import learn_then_test
from .learn_then_test import Array

RISKS = {  # risk: what the cascade does at a loss
    "gap": "is wrong where running every stage is right",
    "consistency": "predicts another class than running every stage does",
    "error": "is wrong",
}


class Point(NamedTuple):
    """One candidate, measured on the rows held out.

    Attributes:
        threshold: the probability, as the other half of the rows estimates it, that leaving does no
            harm; whoever is surer leaves. inf: nobody leaves.
        risk: the share of rows with a loss.
        bound: upper confidence bound of the risk at level 1 - delta (Clopper and Pearson), of this
            point alone.
        leaving: the share of rows that leave after each stage; the last one's have run them all.
        cost: per row.
    """

    threshold: float
    risk: float
    bound: float
    leaving: tuple[float, ...]
    cost: float


class Exit(NamedTuple):
    """Who leaves after one stage, among the rows held out.

    Attributes:
        rows: how many.
        risk: the share of them with a loss; None without rows. No guarantee covers it: it can be
            far above the target where few leave.
    """

    rows: int
    risk: float | None


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` chose, what it saw, and what follows.

    Attributes:
        thresholds: one score per stage but the last; a sample leaves when it reaches it. inf:
            nobody leaves there.
        curve: all candidates, from the safest (nobody leaves) to the boldest.
        accepted: how many of them passed; the last of these is the choice.
        per_exit: the risk among those who leave after each stage.
        n: rows held out, on which the guarantee rests.
        risk, target, delta: as given.
        guarantee: a sentence.
    """

    thresholds: tuple[float, ...]
    curve: tuple[Point, ...]
    accepted: int
    per_exit: tuple[Exit, ...]
    n: int
    risk: str
    target: float
    delta: float
    guarantee: str

    @property
    def chosen(self) -> Point:
        """The point of the curve that `thresholds` are."""
        return self.curve[self.accepted - 1]

    @property
    def leaving(self) -> tuple[float, ...]:
        """The share of rows that leave after each stage."""
        return self.chosen.leaving

    def plot(self, where: Any) -> None:
        """Draws risk and bound over the share that leaves early, into axes or a file.

        Raises:
            ImportError: without matplotlib.
        """
        if isinstance(where, (str, Path)):
            try:
                from matplotlib.figure import Figure
            except ImportError as error:
                raise ImportError(
                    f"plot needs matplotlib ({error}): pip install matplotlib"
                ) from error
            figure = Figure(figsize=(5.2, 4.2), layout="constrained")
            self.plot(figure.subplots())
            figure.savefig(where, dpi=150)
            return
        early = [1 - point.leaving[-1] for point in self.curve]
        where.plot(early, [point.risk for point in self.curve], color="#0072B2", label="risk")
        where.plot(
            early, [point.bound for point in self.curve], color="#56B4E9", label="upper bound"
        )
        where.axhline(self.target, color="#666666", linestyle="--", label="target")
        chosen = (1 - self.leaving[-1], self.chosen.risk)
        where.plot(*chosen, color="#0072B2", marker="D", linestyle="", label="chosen")
        where.set(xlabel="share that leaves early", ylabel=f"risk ({self.risk})")
        where.legend(frameon=False)


def calibrate(
    scores: Tensor | Array,
    exits: Tensor | Array,
    targets: Tensor | Array | None,
    costs: Sequence[float] | None = None,
    *,
    risk: str = "gap",
    target: float = 0.01,
    delta: float = 0.1,
    classes: int | None = None,
) -> Calibration:
    """The boldest thresholds whose risk is at most `target` with probability 1 - delta.

    Half of the rows, drawn with a fixed seed, estimate by isotonic regression how probable it is
    that leaving does no harm, given a stage's score. A common threshold on that probability makes
    one order of all stages' exits; where the estimate is flat, higher scores go first. The other
    half tests it. Samples of the future must be drawn as these rows were, and the rows must have
    had no part in training.

    Args:
        scores: floating [n, S - 1], of every row after every stage but the last; larger = surer.
        exits: integers [n, S]: the class predicted if a row left after each stage; the last column
            is that of running them all.
        targets: integers [n]; None for risk "consistency", which does not read them.
        costs: one per stage, counted from the first to the one a row leaves after. Default: 1 each,
            so that the cost is the number of stages run.
        risk: "gap" (wrong, where running every stage is right), "consistency" (another class than
            running every stage) or "error" (wrong).
        target: the share of samples that may have such a loss, in (0, 1).
        delta: the probability, over the draw of the rows, with which it may be more; in (0, 1).
        classes: how many there are, where targets should be checked against it.

    Raises:
        ValueError, TypeError: what does not fit; too few rows for target and delta; for "error",
            that running every stage is already wrong too often.
        ImportError: without scikit-learn.
    """
    if risk not in RISKS:
        raise ValueError(f"calibrate: risk must be one of {', '.join(RISKS)}; got {risk!r}")
    for name, value in (("target", target), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"calibrate: {name} must be above 0 and below 1; got {value!r}")
    scores, exits = _predictions(scores, exits, classes)
    rows, stages = exits.shape
    losses = _losses(exits, _labels(targets, rows, classes, risk), risk)
    spent = _spent(costs, stages)

    needed = learn_then_test.rows_needed(target, delta)
    in_all = max(2, 2 * needed - 1)
    if rows < in_all:
        raise ValueError(
            f"calibrate: {rows} rows are too few for target={target:g} and delta={delta:g}: half "
            f"of them are held out, and even without a loss it takes {needed} there, so {in_all} "
            f"rows in all; give more rows, or raise target or delta"
        )
    learning, testing = learn_then_test.halves(rows)
    probabilities, thresholds = learn_then_test.family(scores[learning], ~losses[learning, :-1])
    scores, losses, n = scores[testing], losses[testing], len(testing)
    lost = np.empty((len(thresholds), n), dtype=bool)
    left = np.empty((len(thresholds), stages), dtype=np.int64)
    for candidate, levels in enumerate(thresholds):
        after = learn_then_test.leave(scores, levels)
        lost[candidate] = losses[np.arange(n), after]
        left[candidate] = np.bincount(after, minlength=stages)
    accepted = learn_then_test.fixed_sequence(lost.T, target, delta)
    failures = lost.sum(1)
    bounds = learn_then_test.upper_bounds(failures, n, delta)
    if not accepted:  # only "error" has losses where nobody leaves
        raise ValueError(
            f"calibrate: running every stage is already wrong on {failures[0]} of {n} rows, "
            f"{failures[0] / n:.4g} (at most {bounds[0]:.4g} at delta={delta:g}), which does not "
            f"keep to target={target:g}; raise target, or use risk='gap'"
        )
    chosen = thresholds[accepted - 1]
    after = learn_then_test.leave(scores, chosen)
    columns = (probabilities, failures / n, bounds, left / n, left @ spent / n)
    return Calibration(
        thresholds=tuple(chosen.tolist()),
        curve=tuple(
            Point(probability, share, bound, tuple(leaving), cost)
            for probability, share, bound, leaving, cost in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ),
        accepted=accepted,
        per_exit=tuple(_exit(losses[after == stage, stage]) for stage in range(stages)),
        n=n,
        risk=risk,
        target=target,
        delta=delta,
        guarantee=(
            f"With probability at least {1 - delta:.6g} over the draw of the rows, the cascade "
            f"{RISKS[risk]} for at most {100 * target:.6g} % of samples drawn as they were (exact "
            f"binomial test on {n} rows held out)."
            + ("" if np.isfinite(chosen).any() else " Nobody leaves early.")
        ),
    )


def _exit(losses: Array) -> Exit:
    return Exit(len(losses), float(losses.mean()) if len(losses) else None)


def _losses(exits: Array, targets: Array | None, risk: str) -> Array:
    """bool [n, S]: whether it is a loss that a row leaves after each stage."""
    if targets is None:
        return exits != exits[:, -1:]
    wrong = exits != targets[:, None]
    return wrong & ~wrong[:, -1:] if risk == "gap" else wrong


def _predictions(scores: Any, exits: Any, classes: int | None) -> tuple[Array, Array]:
    scores, exits = _array(scores), _array(exits)
    if scores.dtype.kind != "f":
        raise TypeError(f"calibrate: scores must be floating; got {scores.dtype}")
    if exits.ndim != 2 or exits.shape[1] < 2:
        raise ValueError(
            f"calibrate: exits must be [n, S], of at least two stages; got {list(exits.shape)}"
        )
    rows, stages = exits.shape
    if scores.shape != (rows, stages - 1):
        raise ValueError(
            f"calibrate: scores must be [n, S - 1] = [{rows}, {stages - 1}], as exits are "
            f"[{rows}, {stages}]; got {list(scores.shape)}"
        )
    finite = np.isfinite(scores)
    if not finite.all():
        row, stage = np.argwhere(~finite)[0]
        raise ValueError(
            f"calibrate: scores must be finite; got {scores[row, stage]} in row {row}, "
            f"stage {stage}"
        )
    return scores.astype(np.float64), _classes(exits, classes, "exits")


def _labels(targets: Any, rows: int, classes: int | None, risk: str) -> Array | None:
    if risk == "consistency":
        return None
    if targets is None:
        raise ValueError(
            f"calibrate: risk {risk!r} needs targets; without them, use risk='consistency'"
        )
    targets = _array(targets)
    if targets.shape != (rows,):
        raise ValueError(
            f"calibrate: targets must be [n] = [{rows}], one class per row of exits; got "
            f"{list(targets.shape)}"
        )
    return _classes(targets, classes, "targets")


def _classes(values: Array, classes: int | None, name: str) -> Array:
    if values.dtype.kind not in "iu":
        raise TypeError(f"calibrate: {name} must be integers, classes; got {values.dtype}")
    beyond = values < 0 if classes is None else (values < 0) | (values >= classes)
    if beyond.any():
        wanted = "at least 0" if classes is None else f"in 0..{classes - 1}"
        raise ValueError(
            f"calibrate: {name} must be {wanted}; got {values[beyond][0]} in row "
            f"{np.argwhere(beyond)[0][0]} ({beyond.sum()} such in all)"
        )
    return values.astype(np.int64)


def _spent(costs: Sequence[float] | None, stages: int) -> Array:
    """[S]: what a row has cost when it leaves after each stage."""
    each = np.ones(stages) if costs is None else np.asarray(costs, dtype=np.float64)
    if each.shape != (stages,) or not (np.isfinite(each) & (each >= 0)).all():
        raise ValueError(
            f"calibrate: costs must be {stages} finite numbers from 0, one per stage; got {costs!r}"
        )
    return each.cumsum()


def _array(values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)
