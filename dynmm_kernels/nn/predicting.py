"""What a batch would take: a fixed part and a slope per branch, fitted to what others took."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[int, tuple[int, ...], float]  # N, samples of each branch (or none), seconds

_REACH = 2  # no guesses for batches so many times larger or smaller than all that were seen
_WRONG = 0.25  # the mean relative error from which on the costs are not believed
_SWEEPS = 100


class Costs:
    """seconds = a + b N + sum over branches with samples of (c_b + d_b n_b), none negative.

    Least squares of relative errors. Without `counts` in the points only a and b.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.num_points = len(points)
        self._rows = [rows for rows, _, _ in points]
        scaled = [[x / t for x in _features(n, counts)] for n, counts, t in points if t > 0]
        self.costs = _nonnegative(scaled)
        wanted = min(3, len(self.costs))
        errors = [sum(map(_product, row, self.costs)) - 1 for row in scaled]
        self.known = len(scaled) >= max(2, wanted) and (
            sum(map(abs, errors)) <= _WRONG * len(errors)
        )

    def predict(self, rows: int, counts: Sequence[int]) -> float | None:
        """Seconds; None where too little is known."""
        features = _features(rows, counts)
        if not self.known or len(features) != len(self.costs):
            return None
        if not min(self._rows) <= _REACH * rows <= _REACH * _REACH * max(self._rows):
            return None
        return sum(map(_product, features, self.costs)) or None

    def parts(self, num_branches: int) -> list[tuple[float, float]] | None:
        """Of each branch the fixed seconds and those per row."""
        if not self.known or len(self.costs) != 2 + 2 * num_branches:
            return None
        return [(self.costs[2 + 2 * b], self.costs[3 + 2 * b]) for b in range(num_branches)]


def _features(rows: int, counts: Sequence[int]) -> list[float]:
    features = [1.0, float(rows)]
    for count in counts:
        features += [float(count > 0), float(count)]
    return features


def _product(a: float, b: float) -> float:
    return a * b


def _nonnegative(rows: Sequence[Sequence[float]]) -> list[float]:
    """x >= 0 with every <row, x> near 1, by descent along one coordinate after the other."""
    size = len(rows[0]) if rows else 0
    matrix = [[sum(row[i] * row[j] for row in rows) for j in range(size)] for i in range(size)]
    sums = [sum(row[i] for row in rows) for i in range(size)]
    x = [0.0] * size
    for _ in range(_SWEEPS):
        for i, line in enumerate(matrix):
            if line[i] > 0:
                step = (sums[i] - sum(map(_product, line, x))) / line[i]
                x[i] = max(0.0, x[i] + step)
    return x
