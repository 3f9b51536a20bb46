"""A cell of a `Chooser`: batches that take about as long, how they run, and when that is looked at.

It measures both ways three times, then runs the faster one. The slower one is tried again when as
much was saved up as the try will lose: one fiftieth of the time of every call, less with every try
that it loses. So a way that is a few per cent behind is looked at often, one that is far behind
rarely, and looking costs two per cent at most. Where a try wins, or the load has
changed, they are measured anew.
"""

from __future__ import annotations

ROUTED, MASKED = "routed", "masked"
_OTHER = {ROUTED: MASKED, MASKED: ROUTED}

_ENOUGH = 3  # measurements of a way before it is judged
_RECENT = 9  # measurements that count; the typical one is their lower median
_FAR = 2.0  # so many times slower after two measurements: judged
_MARGIN = 0.02  # the other way must be better by so much
_DRIFT = 1.5  # the load is another one: the slower way's measurements are forgotten
_SAVED = 0.02  # of each call's time goes into tries
_PATIENCE = 8  # a way that lost often is tried at so many times its price
_SHORT, _LONG = 64, 4  # of so many calls one is measured in the end, if below or above 1 ms
_SETTLED = 4  # measurements until half as many calls are measured


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

    def forget(self) -> None:
        self.recent, self.typical, self.asked = (), None, 0

    def doubt(self) -> None:
        """Lets only the last measurement stand."""
        self.recent = self.recent[-1:]
        self.asked = len(self.recent)


class Cell:
    """Batches that take about as long, and how they run.

    Attributes:
        way: what runs.
        quiet: so many batches, less one, run that way unmeasured.
        times: of both ways. Masked execution takes the same time whatever was chosen, so cells of
            one size share those.
    """

    __slots__ = (
        "_looks",
        "_patience",
        "_reference",
        "_saved",
        "_stride",
        "_tries",
        "_trying",
        "quiet",
        "times",
        "way",
    )

    def __init__(self, routed: Times, masked: Times) -> None:
        self.times = {ROUTED: routed, MASKED: masked}
        self.way = ROUTED
        self._saved = 0.0
        self._patience = 1
        self._looks, self._stride, self.quiet = 0, 1, 1
        self._trying = False
        self._tries = 0  # whose time is not known yet
        self._reference: float | None = None  # of the way, when the other was last measured

    def next(self) -> tuple[str, bool]:
        """How to run the batch that is there, and whether to measure it."""
        if self.quiet > 1:
            self.quiet -= 1
            return self.way, False
        tried = self._trying
        if tried:  # its first call was there to warm up
            self._trying = False
            way = _OTHER[self.way]
        else:
            way = self._in_doubt() or self._best_or_try()
        self.quiet = 1 if self._trying or self._in_doubt() else self._stride
        if not self._trying:
            self.times[way].asked += 1
            self._tries += tried
        return way, not self._trying

    def force(self, way: str, measured: bool) -> tuple[str, bool]:
        """Runs that way, out of turn."""
        self.times[way].asked += measured
        return way, measured

    def record(self, way: str, seconds: float, rows: int, counts: tuple[int, ...]) -> None:
        times, rival = self.times[way], self.times[_OTHER[way]]
        if way != self.way:
            self._reference = rival.typical
        if self._tries and way != self.way and rival.typical is not None:
            self._tries -= 1
            won = seconds < rival.typical
            if won and times.typical is not None and times.typical > rival.typical:
                times.recent, times.asked = (), 1
                rival.doubt()
                self.quiet = 1
            self._patience = 1 if won else min(2 * self._patience, _PATIENCE)
        if times.typical is not None and not _near(seconds, times.typical):
            self.quiet = 1  # by chance, or is the load another one?
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
        self._reference = self._reference or own.typical
        if not _near(own.typical, self._reference):
            self._reference, self._patience = own.typical, 1
            other.forget()  # of another load
            return _OTHER[self.way]
        if other.typical < (1 - _MARGIN) * own.typical:
            self.way, self._patience, self._reference = _OTHER[self.way], 1, other.typical
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


def _near(seconds: float, others: float) -> bool:
    """Whether both can be of one load."""
    return others < _DRIFT * seconds and seconds < _DRIFT * others
