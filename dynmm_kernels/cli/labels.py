"""Labels that keep clear of each other and of what is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

NEAR, STEP, TRIES = 6, 9, 4  # points: from what a label belongs to, and from try to try
OVERLAP, OUTSIDE, CROSSED = 1000.0, 300.0, 3.0


class Label(NamedTuple):
    """A text and the point, in data, that it belongs to."""

    text: str
    at: tuple[float, float]
    colour: str


def place(axes: Any, labels: Iterable[Label], size: int = 9) -> None:
    """Writes each where it covers least: other labels, lines, markers, the rim of the axes.

    Everything else must have been drawn into the axes, and their limits set.
    """
    figure = axes.get_figure()
    figure.draw_without_rendering()  # settles the layout
    drawn = [point for line in axes.get_lines() for point in _along(axes, line)]
    taken: list[Any] = []
    for label in labels:
        note = axes.annotate(
            label.text,
            label.at,
            (0, 0),
            textcoords="offset points",
            color=label.colour,
            fontsize=size,
            annotation_clip=False,
        )
        best = min(_places(), key=lambda place: _cost(note, place, axes, taken, drawn))
        _move(note, best)
        taken.append(note.get_window_extent())


def _places() -> Iterable[tuple[float, float, str, str]]:
    """Offsets in points and alignments, the nearest first."""
    for distance in range(TRIES):
        far = NEAR + STEP * distance
        for x, y in product((1, 0, -1), (1, 0, -1)):
            if x or y:
                yield (
                    *(far * x, far * y),
                    {1: "left", 0: "center", -1: "right"}[x],
                    {1: "bottom", 0: "center", -1: "top"}[y],
                )


def _move(note: Any, place: tuple[float, float, str, str]) -> None:
    x, y, across, up = place
    note.set_position((x, y))
    note.set_horizontalalignment(across)
    note.set_verticalalignment(up)


def _cost(
    note: Any,
    place: tuple[float, float, str, str],
    axes: Any,
    taken: Sequence[Any],
    drawn: Sequence[tuple[float, float]],
) -> float:
    _move(note, place)
    box = note.get_window_extent().padded(2)
    frame = axes.get_window_extent()
    cost = OVERLAP * sum(box.overlaps(other) for other in taken)
    inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    cost += 0 if inside else OUTSIDE
    cost += CROSSED * sum(box.contains(x, y) for x, y in drawn)
    return cost + (abs(place[0]) + abs(place[1])) / STEP


def _along(axes: Any, line: Any, step: float = 4.0) -> Iterable[tuple[float, float]]:
    """Points on the screen along a line, close enough for no label to slip between them."""
    path = line.get_transform().transform(line.get_xydata())
    for (x0, y0), (x1, y1) in pairwise(path):
        pieces = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) / step))
        for i in range(pieces):
            yield x0 + (x1 - x0) * i / pieces, y0 + (y1 - y0) * i / pieces
    if len(path):
        yield tuple(path[-1])
