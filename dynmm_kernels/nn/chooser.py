"""Which of two ways to run a batch is the faster one here, learnt from the calls themselves.

No tensor is seen here, and time only through a `Clock`: a simulated machine can stand behind it.

Batches that take about as long have a `Cell` in common: what is recorded, N to a quarter of an
octave, the share of each branch to a sixteenth. It measures both ways. What no call has shown is
filled in by costs of a fixed part and a slope per branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from .cell import MASKED, ROUTED, Cell, Times
from .predicting import Costs

_CELLS = 512  # kept
_CALLS = 4096  # told apart by every row and count, for speed

Kind = tuple[str, str]  # the device, and what is recorded on it


class Clock(Protocol):
    """Takes times without waiting for them."""

    def mark(self) -> Any:
        """This moment, in the order of the device's work."""

    def seconds(self, begin: Any, end: Any) -> float | None:
        """Between two marks; None as long as the device has not come to the second."""


class Trial:
    """One call that is measured, in one or more stretches."""

    __slots__ = ("_begun", "_cell", "_chooser", "_clock", "_counts", "_rows", "_spans", "way")

    def __init__(
        self,
        chooser: Chooser,
        cell: Cell,
        way: str,
        clock: Clock,
        rows: int,
        counts: tuple[int, ...],
    ) -> None:
        self.way = way
        self._chooser, self._cell, self._clock = chooser, cell, clock
        self._rows, self._counts = rows, counts
        self._spans: list[tuple[Any, Any]] = []
        self._begun: Any = None

    def start(self) -> None:
        self._begun = self._clock.mark()

    def stop(self) -> None:
        self._spans.append((self._begun, self._clock.mark()))

    def close(self) -> None:
        """There are no more stretches. The time is recorded once the device tells it."""
        if not self.settle():
            self._chooser.waiting = [*self._chooser.waiting, self]

    def settle(self) -> bool:
        """Whether the time could be recorded."""
        total = 0.0
        for begin, end in reversed(self._spans):
            seconds = self._clock.seconds(begin, end)
            if seconds is None:
                return False
            total += seconds
        self._cell.record(self.way, total, self._rows, self._counts)
        return True


class Estimate(NamedTuple):
    """Of one way: seconds measured and their number, seconds predicted; None: not known."""

    measured: float | None
    calls: int
    predicted: float | None


class Chooser:
    """Chooses for one fusion, for each of its batches; see above.

    Attributes:
        barred: why masked execution is out of the question; None: it is not.
        forced: the way to run whatever is known, and whether to measure it.
        last: what the last call asked; why it did not ask; None: there was none.
        waiting: trials whose times the device has not told yet.
    """

    def __init__(self) -> None:
        self.barred: str | None = None
        self.forced: tuple[str, bool] | None = None
        self.last: tuple[Kind, int, tuple[int, ...]] | str | None = None
        self.waiting: list[Trial] = []
        self._masked: dict[tuple[Kind, int], Times] = {}
        self._cells: dict[tuple[Kind, int, tuple[int, ...]], Cell] = {}
        self._costs: dict[tuple[Kind, str], Costs] = {}
        self._calls: dict[tuple[Kind, int, tuple[int, ...]], Cell] = {}

    def recall(self, kind: Kind, rows: int, counts: tuple[int, ...]) -> str | None:
        """How to run such a batch as was seen before, unmeasured; None: `choose` must say."""
        asked = kind, rows, counts
        cell = self._calls.get(asked)
        if cell is None or cell.quiet < 2 or self.forced is not None:
            return None
        cell.quiet -= 1
        self.last = asked
        return cell.way

    def choose(
        self, kind: Kind, rows: int, counts: tuple[int, ...], clock: Clock
    ) -> tuple[str, Trial | None]:
        """How to run a batch, and what measures it; None where nothing does.

        Args:
            kind: batches of another kind have nothing to do with it.
            rows: N, at least 1.
            counts: samples of each branch; empty where they are not known yet.
        """
        if self.waiting:
            self.waiting = [trial for trial in self.waiting if not trial.settle()]
        key = _key(kind, rows, counts)
        cell = self._cells.get(key) or self._open(key, rows, counts)
        self.last = kind, rows, counts
        if len(self._calls) >= _CALLS:
            self._calls.clear()
        self._calls[self.last] = cell
        way, measured = cell.next() if self.forced is None else cell.force(*self.forced)
        return way, Trial(self, cell, way, clock, rows, counts) if measured else None

    def _open(self, key: Any, rows: int, counts: Sequence[int]) -> Cell:
        kind, size, _ = key
        if len(self._cells) >= _CELLS:
            self._cells = dict([*self._cells.items()][_CELLS // 2 :])
            self._calls.clear()
        cell = Cell(Times(), self._masked.setdefault((kind, size), Times()))
        predicted = {way: self._predict(kind, way, rows, counts) for way in cell.times}
        if all(predicted[way] or cell.times[way].recent for way in cell.times):
            for way, times in cell.times.items():
                times.typical = times.typical or predicted[way]
        self._cells[key] = cell
        return cell

    def explain(
        self, kind: Kind, rows: int, counts: Sequence[int]
    ) -> tuple[str, dict[str, Estimate]]:
        """The way that such a batch runs, and what is known of both."""
        cell = self._cells.get(_key(kind, rows, counts)) or Cell(Times(), Times())
        estimates = {}
        for way, times in cell.times.items():
            measured = times.typical if times.recent else None
            predicted = self._predict(kind, way, rows, counts)
            estimates[way] = Estimate(measured, len(times.recent), predicted)
        return cell.way, estimates

    def parts(self, kind: Kind, num_branches: int) -> list[tuple[float, float]] | None:
        """Seconds that each branch takes when routed: at all, and per row; None: not known."""
        costs = self._fitted(kind, ROUTED)
        return costs.parts(num_branches) if costs else None

    def _predict(self, kind: Kind, way: str, rows: int, counts: Sequence[int]) -> float | None:
        costs = self._fitted(kind, way)
        return costs.predict(rows, counts if way == ROUTED else ()) if costs else None

    def _fitted(self, kind: Kind, way: str) -> Costs | None:
        points = self._points(kind, way)
        costs = self._costs.get((kind, way))
        if costs is None or len(points) > 1.2 * costs.num_points:
            costs = self._costs[kind, way] = Costs(points)
        return costs

    def _points(self, kind: Kind, way: str) -> list[tuple[int, tuple[int, ...], float]]:
        known: list[tuple[int, tuple[int, ...], Times]]
        if way == MASKED:
            known = [(t.rows, (), t) for (k, _), t in self._masked.items() if k == kind]
        else:
            own = [cell.times[ROUTED] for (k, *_), cell in self._cells.items() if k == kind]
            known = [(t.rows, t.counts, t) for t in own]
        return [(n, counts, t.typical) for n, counts, t in known if t.recent]  # type: ignore[misc]

    def state(self) -> dict[str, Any]:
        """What was learnt, of plain lists, numbers and strings."""
        cells = [
            [*kind, size, [*shares], cell.way, _dump(cell.times[ROUTED])]
            for (kind, size, shares), cell in self._cells.items()
        ]
        masked = [[*kind, size, _dump(times)] for (kind, size), times in self._masked.items()]
        return {"version": 1, "barred": self.barred, "masked": masked, "cells": cells}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over what another chooser has learnt, in place of what is known here.

        Raises:
            ValueError: it is no such state.
        """
        fresh = Chooser()
        try:
            if state["version"] != 1:
                raise ValueError(f"version {state['version']}")
            fresh.barred = state["barred"]
            for device, recorded, size, times in state["masked"]:
                fresh._masked[(device, recorded), size] = _load(times)
            for device, recorded, size, shares, way, times in state["cells"]:
                kind = device, recorded
                masked = fresh._masked.setdefault((kind, size), Times())
                cell = Cell(_load(times), masked)
                cell.way = ROUTED if way == ROUTED else MASKED
                fresh._cells[kind, size, tuple(shares)] = cell
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"load_auto_state: wanted what auto_state() returned, version 1; got "
                f"{type(state).__name__} ({type(error).__name__}: {error})"
            ) from error
        self.__dict__.update(fresh.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles know what was learnt, not what is being measured."""
        return self.state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        Chooser.__init__(self)
        self.load(state)


def _key(kind: Kind, rows: int, counts: Sequence[int]) -> tuple[Kind, int, tuple[int, ...]]:
    bits = rows.bit_length() - 3
    size = rows >> bits << bits if bits > 0 else rows
    return kind, size, tuple([-(-16 * count // rows) for count in counts])


def _dump(times: Times) -> list[Any]:
    return [times.rows, [*times.counts], [*times.recent]]


def _load(given: Sequence[Any]) -> Times:
    times = Times()
    rows, counts, recent = given
    for seconds in recent:
        times.add(float(seconds), int(rows), tuple(counts))
    times.asked = len(times.recent)
    return times
