"""The one path of every row: contestants are checked, timed in turns and handed over."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pytest

from benchmarks.replay import replay
from dynmm_kernels.measure.timing import Effort, interleave


@dataclass(frozen=True)
class Row:
    """One contestant."""

    call: Callable[[], Any]
    compares_to: str | None = None
    """The row that does the same work without routing: the denominator of the overhead."""
    ceiling: float | None = None
    """The speed-up over running everything that its multiply-accumulates allow."""
    memory: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    """What to count, in bytes, after the timing."""


@dataclass(frozen=True)
class Contest:
    rows: dict[str, Row]
    errors: dict[str, float]
    """How far each row is from what it must compute."""
    tolerance: float = 0.0
    device: str = "cpu"

    def run(self, effort: Effort) -> "Outcome":
        """Times the rows that are right, together, and counts their memory."""
        rows = {n: row for n, row in self.rows.items() if self.errors[n] <= self.tolerance}
        calls = {name: row.call for name, row in rows.items()}
        return Outcome(
            self.errors,
            {name: row.ceiling for name, row in rows.items()},
            {name: row.compares_to for name, row in rows.items()},
            interleave(calls, effort, self.device) if calls else {},
            {n: {what: count() for what, count in row.memory.items()} for n, row in rows.items()},
        )


@dataclass(frozen=True)
class Outcome:
    """What is kept of a contest: numbers, no model. A row that was wrong has no times."""

    errors: dict[str, float]
    ceilings: dict[str, float | None]
    compares_to: dict[str, str | None]
    seconds: dict[str, list[float]]
    """Of each round."""
    memory: dict[str, dict[str, int]]

    def median(self, row: str) -> float:
        return median(self.seconds[row])

    def ratio(self, slow: str, fast: str) -> float | None:
        """Median over rounds of the two rows' quotient: a slow moment hits both."""
        if slow not in self.seconds or fast not in self.seconds:
            return None
        rounds = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return median(a / b for a, b in rounds)

    def gains(self, row: str, over: str = "masked") -> dict[str, float | None]:
        """What a row wins, of how much it could win, and what routing itself costs."""
        realised, ceiling = self.ratio(over, row), self.ceilings[row]
        gains = {"realised": realised}
        if ceiling is not None:
            gains["ceiling"] = ceiling
            if realised is not None:
                gains["realised_over_ceiling"] = realised / ceiling
        if (bare := self.compares_to[row]) is not None:
            gains["overhead"] = self.ratio(row, bare)
        return gains


Outcomes = dict[Any, Outcome]


def race(
    outcomes: Outcomes,
    benchmark: Any,
    effort: Effort,
    setting: Any,
    row: str,
    contest: Callable[[], Contest],
) -> None:
    """Runs a contest for its first row and keeps the outcome for the others; fails for a wrong row.

    `setting` is the contest's key and, as a string, its name in the tables; its
    `info(outcome, row)` goes beside the times of a row.
    """
    if setting not in outcomes:
        outcomes[setting] = contest().run(effort)
    outcome = outcomes[setting]
    if row not in outcome.seconds:
        pytest.fail(f"{row}: relative error {outcome.errors[row]:.1e}; not timed")
    benchmark.group = str(setting)
    benchmark.extra_info.update(setting.info(outcome, row))
    replay(benchmark, outcome.seconds[row])
