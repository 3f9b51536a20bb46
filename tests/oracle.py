"""What the functional floor means, one sample at a time, in lists: no tensors, nothing to be fast.

A row is anything that can sit in a list: `bytes` where rows only move, a list of numbers where they
are added. Independent of the library: it shares no code and no data structure with it.
"""

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

Number = Any
Row = Any


class Plan(NamedTuple):
    order: list[int]  # slot -> flat entry n * ranks + j, then -1 for entries without a branch
    inverse: list[list[int]]  # [n][j] -> slot, or -1
    offsets: list[int]  # branch b owns the slots offsets[b] .. offsets[b + 1]
    ranks: int

    def starts(self) -> list[int]:
        return self.offsets[:-1]


def entries(selection: list) -> list[list[int]]:
    """The branch of every (row, rank) for a choice [N], ranked choices [N][k] or a mask [N][B]."""
    if not selection or not isinstance(selection[0], list):
        return [[branch] for branch in selection]
    if not selection[0] or not isinstance(selection[0][0], bool):
        return selection
    return [[b if chosen else -1 for b, chosen in enumerate(row)] for row in selection]


def route(selection: list, num_branches: int, ranks: int) -> Plan:
    order: list[int] = []
    offsets = [0]
    chosen = entries(selection)
    inverse = [[-1] * ranks for _ in chosen]
    members: list[list[tuple[int, int]]] = [[] for _ in range(num_branches)]
    for n, row in enumerate(chosen):
        for j, branch in enumerate(row):
            if branch >= 0:
                members[branch].append((n, j))
    for branch in range(num_branches):
        for n, j in members[branch]:
            inverse[n][j] = len(order)
            order.append(n * ranks + j)
        offsets.append(len(order))
    order += [-1] * (len(chosen) * ranks - len(order))
    return Plan(order, inverse, offsets, ranks)


def gather_rows(source, start, stop, order, ranks, weights=None, cast=lambda x: x) -> list[Row]:
    """The rows of `source` in the slots start .. stop, each times the weight of its entry."""
    out = []
    for slot in range(start, stop):
        n, j = divmod(order[slot], ranks)
        row = source[n]
        out.append(row if weights is None else [cast(weights[n][j] * v) for v in row])
    return out


def rows_by_slot(outputs, starts) -> dict[int, Row]:
    """The row in every slot; slots of branches that are not given (or None) have none."""
    given = [(start, rows) for start, rows in zip(starts, outputs, strict=True) if rows is not None]
    return {start + i: row for start, rows in given for i, row in enumerate(rows)}


def combine_rows(outputs, starts, inverse, zero, weights=None, cast=lambda x: x) -> list[Row]:
    """Rows back in sample order: moved for one unweighted rank, else summed in rank order.

    `cast` rounds every product and every partial sum to the precision of the accumulation.
    """
    result = []
    rows = rows_by_slot(outputs, starts)
    for n, slots in enumerate(inverse):
        found = [(j, rows[slot]) for j, slot in enumerate(slots) if slot in rows]
        if len(slots) == 1 and weights is None:
            result.append(found[0][1] if found else zero)
            continue
        total = list(zero)
        for j, row in found:
            terms = row if weights is None else [cast(weights[n][j] * v) for v in row]
            total = [cast(a + t) for a, t in zip(total, terms, strict=True)]
        result.append(total)
    return result


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def row_dots(rows, outputs, starts, inverse) -> list[list[float]]:
    """<rows[n], y(n, j)>: the gradient of a weight. 0 where there is no y."""
    found = rows_by_slot(outputs, starts)
    return [
        [dot(rows[n], found[slot]) if slot in found else 0.0 for slot in slots]
        for n, slots in enumerate(inverse)
    ]


def gather(rows, plan: Plan) -> list[list[Row]]:
    spans = zip(plan.offsets[:-1], plan.offsets[1:], strict=True)
    return [gather_rows(rows, start, stop, plan.order, plan.ranks) for start, stop in spans]


def combine(outputs, plan: Plan, zero, weights=None, cast: Callable = lambda x: x) -> list[Row]:
    return combine_rows(outputs, plan.starts(), plan.inverse, zero, weights, cast)


def fp32(value: float) -> float:
    """The fp32 nearest to a Python float; exact for sums and products of two fp32 numbers."""
    return struct.unpack("f", struct.pack("f", value))[0]


def logsumexp(row: Row) -> float:
    top = max(row)
    return top + math.log(math.fsum(math.exp(v - top) for v in row))


def cross_entropy(row: Row, target) -> float:
    """Of a class, or the mean of the binary ones of a label per class."""
    if isinstance(target, int):
        return logsumexp(row) - row[target]
    pairs = zip(row, target, strict=True)
    terms = [math.log1p(math.exp(-abs(v))) + max(v, 0) - v * y for v, y in pairs]
    return math.fsum(terms) / len(row)


def energy_fuse(logits, targets=None, present=None, weights="energy", scale=0.1):
    """QMF, sample by sample: logits[m][n] are rows; fused, confidence and losses as lists."""
    fused, confidence, losses = [], [], []
    for n, rows in enumerate(zip(*logits, strict=True)):
        here = [m for m in range(len(rows)) if present is None or present[n][m]]
        own = {m: scale * logsumexp(rows[m]) for m in here}
        if weights == "energy":
            w = own
        elif weights == "softmax":
            w = {m: math.exp(own[m] - logsumexp([*own.values()])) for m in here}
        elif weights == "uniform":
            w = {m: 1 / len(here) for m in here}
        else:
            w = {m: weights[n][m] for m in here}
        total = [math.fsum(w[m] * rows[m][c] for m in here) for c in range(len(rows[0]))]
        fused.append(total)
        confidence.append([own.get(m, 0.0) for m in range(len(rows))])
        if targets is not None:
            each = [
                cross_entropy(rows[m], targets[n]) if m in own else 0.0 for m in range(len(rows))
            ]
            losses.append([*each, cross_entropy(total, targets[n])])
    return fused, confidence, losses
