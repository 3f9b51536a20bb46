"""Which of two ways to run a batch is the faster one here, learnt from the calls themselves.

No tensor is seen here, and time only through a `Clock`: a simulated machine can stand behind it.

A cell is what batches have in common that take about as long: what is recorded, N to a quarter of
an octave, the share of each branch to a sixteenth. A cell measures both ways three times, then runs
the faster one. The slower one is tried again when as much was saved up as the try will lose: one
fiftieth of the time of every call, less with every try that it loses. So a way that is a few per
cent behind is looked at often, one that is far behind rarely, and looking costs two per cent at
most. Where a try wins, both are measured anew. What no call has shown is filled in by costs of a
fixed part and a slope per branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from .predicting import Costs

ROUTED, MASKED = "routed", "masked"
_OTHER = {ROUTED: MASKED, MASKED: ROUTED}

_ENOUGH = 3  # measurements of a way before it is judged
_RECENT = 9  # measurements that count; the typical one is their lower median
_FAR = 2.0  # so many times slower after two measurements: judged
_MARGIN = 0.02  # the other way must be better by so much
_SAVED = 0.02  # of each call's time goes into tries
_PATIENCE = 8  # a way that lost often is tried at so many times its price
_SHORT, _LONG = 16, 4  # of so many calls one is measured in the end, if below or above 1 ms
_SETTLED = 4  # measurements until half as many calls are measured
_CELLS = 512  # kept

Kind = tuple[str, str]  # the device, and what is recorded on it


class Clock(Protocol):
    """Takes times without waiting for them."""

    def mark(self) -> Any:
        """This moment, in the order of the device's work."""

    def seconds(self, begin: Any, end: Any) -> float | None:
        """Between two marks; None as long as the device has not come to the second."""


class Times:
    """What one way was measured to take, in seconds.

    Attributes:
        recent: the last measurements.
        typical: their lower median; before there are any, what was predicted, or None.
        asked: how many measurements were begun since it was last in doubt.
        rows, counts: of the last batch that was measured.
    """

    __slots__ = ("asked", "counts", "recent", "rows", "typical")

    def __init__(self) -> None:
        self.recent: tuple[float, ...] = ()
        self.typical: float | None = None
        self.asked = 0
        self.rows = 0
        self.counts: tuple[int, ...] = ()

    def add(self, seconds: float, rows: int, counts: tuple[int, ...]) -> None:
        self.recent = recent = (*self.recent[1 - _RECENT :], seconds)
        self.typical = sorted(recent)[(len(recent) - 1) // 2]
        self.rows, self.counts = rows, counts

    def doubt(self) -> None:
        """Lets only the last measurement stand."""
        self.recent = self.recent[-1:]
        self.asked = len(self.recent)


class Cell:
    """Batches that take about as long, and how they run.

    Attributes:
        way: what runs.
        times: of both ways. Masked execution takes the same time whatever was chosen, so cells of
            one size share those.
    """

    __slots__ = ("_looks", "_patience", "_quiet", "_saved", "_stride", "_trying", "times", "way")

    def __init__(self, routed: Times, masked: Times) -> None:
        self.times = {ROUTED: routed, MASKED: masked}
        self.way = ROUTED
        self._saved = 0.0
        self._patience = 1
        self._looks, self._stride, self._quiet = 0, 1, 1
        self._trying = False

    def next(self) -> tuple[str, bool]:
        """How to run the batch that is there, and whether to measure it."""
        self._quiet -= 1
        if self._quiet > 0:
            return self.way, False
        if self._trying:  # its first call was there to warm up
            self._trying = False
            way = _OTHER[self.way]
        else:
            way = self._in_doubt() or self._best_or_try()
        self._quiet = 1 if self._trying or self._in_doubt() else self._stride
        if not self._trying:
            self.times[way].asked += 1
        return way, not self._trying

    def force(self, way: str, measured: bool) -> tuple[str, bool]:
        """Runs that way, out of turn."""
        self.times[way].asked += measured
        return way, measured

    def record(self, way: str, seconds: float, rows: int, counts: tuple[int, ...]) -> None:
        times, rival = self.times[way], self.times[_OTHER[way]]
        if way != self.way and times.recent and rival.typical is not None:
            won = seconds < rival.typical
            if won and times.typical is not None and times.typical > rival.typical:
                times.recent, times.asked = (), 1
                rival.doubt()
                self._quiet = 1
            self._patience = 1 if won else min(2 * self._patience, _PATIENCE)
        times.add(seconds, rows, counts)

    def _in_doubt(self) -> str | None:
        """A way that must be measured before one can choose; routed first."""
        lacking = [way for way, times in self.times.items() if self._lacks(times)]
        return lacking[0] if lacking else None

    def _lacks(self, times: Times) -> bool:
        if times.asked >= _ENOUGH or (not times.recent and times.typical is not None):
            return False
        if min(len(t.recent) for t in self.times.values()) < 2:
            return True
        fast, slow = sorted(t.typical or 0.0 for t in self.times.values())
        return slow <= _FAR * fast

    def _best_or_try(self) -> str:
        own, other = self.times[self.way], self.times[_OTHER[self.way]]
        if own.typical is None or other.typical is None:
            return self._ask_again()
        if other.typical < (1 - _MARGIN) * own.typical:
            self.way, self._patience = _OTHER[self.way], 1
            if self._stride > 1:  # what was measured of it is old
                other.doubt()
            return self.way
        self._saved += _SAVED * own.typical * self._stride
        price = 2 * self._patience * max(other.typical - own.typical, _MARGIN * own.typical)
        if self._saved >= price:
            self._saved, self._trying = self._saved - price, True
            return _OTHER[self.way]
        self._looks += 1
        if self._looks >= _SETTLED:
            self._looks = 0
            self._stride = min(2 * self._stride, _LONG if own.typical > 1e-3 else _SHORT)
        return self.way

    def _ask_again(self) -> str:
        """Measurements were begun and never ended: a forward without its backward."""
        self._looks += 1
        if self._looks % _SETTLED == 0:
            for times in self.times.values():
                times.asked = len(times.recent)
        return ROUTED


class Trial:
    """One call that is measured, in one or more stretches."""

    __slots__ = ("_begun", "_cell", "_chooser", "_clock", "_counts", "_rows", "_spans", "way")

    def __init__(
        self, chooser: Chooser, cell: Cell, way: str, clock: Clock, rows: int, counts: Sequence[int]
    ) -> None:
        self.way = way
        self._chooser, self._cell, self._clock = chooser, cell, clock
        self._rows, self._counts = rows, tuple(counts)
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

    def choose(
        self, kind: Kind, rows: int, counts: Sequence[int], clock: Clock
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
        self.last = kind, rows, tuple(counts)
        way, measured = cell.next() if self.forced is None else cell.force(*self.forced)
        return way, Trial(self, cell, way, clock, rows, counts) if measured else None

    def _open(self, key: Any, rows: int, counts: Sequence[int]) -> Cell:
        kind, size, _ = key
        if len(self._cells) >= _CELLS:
            self._cells = dict([*self._cells.items()][_CELLS // 2 :])
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
