"""pytest-benchmark's tables and JSON from rounds that were measured in turns."""

from collections.abc import Iterator

import pytest


class Replay:
    """Hands recorded durations to pytest-benchmark.

    The rounds of one row were measured among those of its whole group. The fixture is given a
    target that does nothing but let this clock run on by the next recorded duration, so that its
    tables, its JSON and its comparisons rest on the interleaved rounds.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._left: Iterator[float] = iter(())

    def now(self) -> float:
        return self._now

    def __call__(self, benchmark, seconds: list[float]) -> None:
        self._left = iter(seconds)
        benchmark.pedantic(self._run, rounds=len(seconds))

    def _run(self) -> None:
        self._now += next(self._left)


replay = Replay()
replayed = pytest.mark.benchmark(timer=replay.now)
