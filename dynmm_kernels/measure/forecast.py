"""What a fusion takes routed and masked, computed from what its parts were measured to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

STEPS = 100  # of the shares that are tried
TINY = 1e-9  # seconds, less than can be told
STRAIGHT = 0.1  # how far from its line a straight curve may be


class Line(NamedTuple):
    """Seconds of n rows: fixed + slope * n."""

    fixed: float
    slope: float
    deviation: float
    """How far a measured point is from the line at most, as a part of the point."""

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Line:
        """The least relative errors, with neither part below zero."""
        points = [(rows, max(seconds, TINY)) for rows, seconds in points]
        if len(points) == 1:
            rows, seconds = points[0]
            return cls(0.0, seconds / rows, 0.0)
        weighted = [(1 / seconds**2, rows, seconds) for rows, seconds in points]
        w, x, y, xx, xy = (
            sum(weight * value(rows, seconds) for weight, rows, seconds in weighted)
            for value in _MOMENTS
        )
        spread = w * xx - x * x
        slope = (w * xy - x * y) / spread if spread > 0 else 0.0
        fixed = (y - slope * x) / w
        if slope < 0:
            fixed, slope = y / w, 0.0
        elif fixed < 0:
            fixed, slope = 0.0, xy / xx
        off = max(abs((fixed + slope * rows) / seconds - 1) for rows, seconds in points)
        return cls(fixed, slope, off)


_MOMENTS = (
    lambda rows, seconds: 1.0,
    lambda rows, seconds: rows,
    lambda rows, seconds: seconds,
    lambda rows, seconds: rows * rows,
    lambda rows, seconds: rows * seconds,
)


@dataclass(frozen=True)
class Curve:
    """Seconds by rows: along `line` where it fits the points, else straight from one to the next.

    No rows take no time; a part of a row stands for a batch that has that row now and then.
    """

    points: tuple[tuple[float, float], ...]

    @cached_property
    def line(self) -> Line:
        return Line.through(self.points)

    @property
    def is_straight(self) -> bool:
        return self.line.deviation <= STRAIGHT

    def __call__(self, rows: float) -> float:
        if self.is_straight:
            return min(rows, 1.0) * self.line.fixed + self.line.slope * rows
        known = ((0.0, 0.0), *self.points)
        for (x0, y0), (x1, y1) in pairwise(known):
            if rows <= x1:
                return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)
        last, seconds = known[-1]
        return seconds + self.line.slope * (rows - last)


@dataclass(frozen=True)
class Forecast:
    """Seconds of a call, the sum of its parts.

    Attributes:
        gate: by rows of the batch.
        branches: by rows that a branch runs on.
        routing: by rows of the batch: what routing adds, with branches that take no time.
        blend: the same of masked execution.
        rest: of each branch, by rows it was not chosen for, where they run, too.
        coupled: branches that run on the whole batch in any case.
    """

    gate: Curve
    branches: Mapping[str, Curve]
    routing: Curve
    blend: Curve
    rest: Mapping[str, Curve] = field(default_factory=dict)
    coupled: frozenset[str] = frozenset()

    def masked(self, rows: float) -> float:
        branches = sum(curve(rows) for curve in self.branches.values())
        return self.gate(rows) + branches + self.blend(rows)

    def routed(self, rows: float, shares: Sequence[float]) -> float:
        seconds = self.gate(rows) + self.routing(rows)
        for (name, curve), share in zip(self.branches.items(), shares, strict=True):
            if name in self.coupled:
                seconds += curve(rows)
                continue
            own = share * rows
            seconds += curve(own)
            if name in self.rest:
                seconds += self.rest[name](rows - own)
        return seconds

    def speedup(self, rows: float, shares: Sequence[float]) -> float:
        """Of routed over masked."""
        return self.masked(rows) / self.routed(rows, shares)

    @property
    def costly(self) -> int:
        """The branch whose rows take longest."""
        slopes = [curve.line.slope for curve in self.branches.values()]
        return slopes.index(max(slopes))

    def by_share(
        self, rows: float, shares: Sequence[float], several: bool = False
    ) -> list[tuple[float, float]]:
        """(share of the costly branch, speed-up); see `with_share` for the other branches."""
        curve = []
        for step in range(STEPS + 1):
            wanted = with_share(shares, self.costly, step / STEPS, several)
            if wanted is not None:
                curve.append((step / STEPS, self.speedup(rows, wanted)))
        return curve

    def even_share(
        self, rows: float, shares: Sequence[float], several: bool = False
    ) -> float | None:
        """Below that share of the costly branch routing pays; None: at none."""
        before = None
        for share, speedup in self.by_share(rows, shares, several):
            if speedup <= 1:
                if before is None:
                    return None
                x, y = before
                return x + (share - x) * (y - 1) / (y - speedup)
            before = share, speedup
        return None if before is None else before[0]

    def even_batch(self, shares: Sequence[float], most: int) -> int | None:
        """From that batch on routing pays, looking up to `most`; None: there it does not."""
        sizes = [*range(1, min(most, 64) + 1)]
        while sizes[-1] < most:
            sizes.append(min(most, sizes[-1] * 9 // 8))
        found = None
        for size in reversed(sizes):
            if self.speedup(size, shares) <= 1:
                break
            found = size
        return found


def with_share(
    shares: Sequence[float], branch: int, share: float, several: bool = False
) -> list[float] | None:
    """`shares` where that of one branch is `share`, and the others make room, in proportion.

    several: they need not, a sample takes as many branches as it likes. None: there is no room.
    """
    if several:
        return [share if b == branch else its for b, its in enumerate(shares)]
    left, others = sum(shares) - share, sum(shares) - shares[branch]
    if left < -1e-9:
        return None
    count = len(shares) - 1
    made = [
        share if b == branch else (its * left / others if others > 0 else left / count)
        for b, its in enumerate(shares)
    ]
    return made if all(its <= 1 + 1e-9 for its in made) else None
