"""python -m dynmm_kernels plot: speed-up, or time, against the share of costly samples.

Reads what `pytest benchmarks/ --benchmark-json`, `bench --json` or `profile --json` wrote, of at
least two shares. A filled diamond marks where routed breaks even with masked, a hollow one where it
breaks even with running the costly branch for everyone and no gate. Of a profile the line is the
prediction, and the dots were measured.

Writes a PNG, and an SVG and a CSV beside it. With --json it prints the points, and writes only
where -o says so.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from .labels import Label, place
from .options import Mistake, add_json
from .plot_rows import FIELDS, Row, ceiling_curve, panels, points, read, write_csv

EXAMPLES = """\
examples:
  python -m dynmm_kernels bench --json > bench.json
  python -m dynmm_kernels plot bench.json
  python -m dynmm_kernels plot profile.json --time -o time.png
  python -m dynmm_kernels plot results.json --json
"""

# Okabe and Ito's palette, which survives the common colour blindnesses; one colour per batch size.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#666666"

TITLES = {
    ("imdb", "forward"): "MM-IMDB, inference",
    ("imdb", "training"): "MM-IMDB, training step",
    ("mosei", "forward"): "CMU-MOSEI, inference",
    ("mosei", "training"): "CMU-MOSEI, training step",
}
KINDS = {"forward": "inference", "training": "training step"}

TIMED = ("masked", "dense", "routed", "auto", "loop")  # the rows of which --time draws times

Batches = dict[int, list[Row]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="a JSON file; see above")
    parser.add_argument("-o", "--out", type=Path, help="default: beside the results, as .png")
    parser.add_argument("--time", action="store_true", help="draw times, not speed-ups")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    rows = read(arguments.results)
    drawn = panels(rows)
    if not drawn:
        raise Mistake(f"{arguments.results} has no workload with routed rows at two shares")
    out = arguments.out or arguments.results.with_suffix(".png")
    if arguments.out or not arguments.json:
        plot(drawn, out, arguments.time)
        write_csv(rows, out)
    if arguments.json:
        print(json.dumps([{field: row[field] for field in FIELDS} for row in rows], indent=2))
    else:
        print(*(out.with_suffix(suffix) for suffix in (".png", ".svg", ".csv")), sep="\n")
    return 0


def crossing(curve: list[tuple[float, float]], level: float = 1.0) -> float | None:
    """The active share at which a falling curve first reaches ``level``, by interpolation."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y0 >= level > y1:
            return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return None


def draw_speedups(axes: Any, kind: str, batches: Batches) -> list[Label]:
    labels = [Label("masked = 1", (0.02, 1), "black")]
    axes.axhline(1, color="black", linewidth=1)
    limits = ceiling_curve(next(iter(batches.values()))[0]["info"], kind)
    if limits:
        axes.plot(*zip(*limits, strict=True), color=GREY, linestyle="--", linewidth=1.2)
        labels.append(Label("FLOP ceiling", limits[20], GREY))
    for colour, (n, batch) in zip(COLOURS, sorted(batches.items()), strict=False):
        measured, predicted = points(batch, "routed"), points(batch, "predicted")
        curve = predicted or measured
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.5)
        axes.plot(*zip(*measured, strict=True), color=colour, marker="o", linestyle="none")
        labels.insert(0, Label(f"N = {n}", curve[-1], colour))
        if (even := crossing(curve)) is not None:
            axes.plot(even, 1, marker="D", color=colour, markeredgecolor="black", markersize=8)
            labels.append(Label(f"break-even {even:.2f}", (even, 1), colour))
        if static := points(batch, "static_e2"):
            level = median(speedup for _, speedup in static)
            axes.axhline(level, color=colour, linewidth=0.8, linestyle=":")
            if (even := crossing(curve, level)) is not None:
                axes.plot(even, level, marker="D", color="white", markeredgecolor=colour)
                labels.append(Label(f"{even:.2f}", (even, level), colour))
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.8, low), high)
    ticks = (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter("{x:g}x")
    return labels


def draw_times(axes: Any, kind: str, batches: Batches) -> list[Label]:
    """With a legend beside the axes, as the lines may lie on each other."""
    from matplotlib.ticker import LogLocator, NullLocator

    for row, style in zip(TIMED, ("-", ":", "-", "--", "-."), strict=True):
        for colour, (n, batch) in zip(COLOURS, sorted(batches.items()), strict=False):
            if curve := points(batch, row, "median_ms"):
                marker = "o" if row == "routed" else ""
                look = {"color": colour, "linestyle": style, "marker": marker}
                axes.plot(*zip(*curve, strict=True), **look, label=f"{row}, N = {n}")
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    return []


def plot(drawn: dict[tuple[str, str], Batches], out: Path, time: bool = False) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Mistake(f"drawing needs matplotlib ({error}): pip install '.[plot]'") from None
    figure = Figure(figsize=(5.2 * len(drawn), 4.2), layout="constrained")
    grid = figure.subplots(1, len(drawn), squeeze=False)
    found = []
    for axes, (panel, batches) in zip(grid[0], drawn.items(), strict=True):
        workload, kind = panel
        found.append((draw_times if time else draw_speedups)(axes, kind, batches))
        title = TITLES.get(panel, f"{workload}, {KINDS.get(kind, kind)}")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("share of samples that need the costly branch")
        axes.set_xlim(-0.03, 1.03 if time else 1.2)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("time, ms" if time else "speed-up of routed over masked")
    rows = [row for batches in drawn.values() for batch in batches.values() for row in batch]
    figure.supxlabel(_about(rows, time), fontsize=8, color=GREY)
    for axes, labels in zip(grid[0], found, strict=True):
        place(axes, labels)
    figure.savefig(out.with_suffix(".png"), dpi=150)
    figure.savefig(out.with_suffix(".svg"))


def _about(rows: list[Row], time: bool) -> str:
    info = rows[0]["info"]
    text = ", ".join(str(info[key]) for key in ("device", "dtype") if key in info)
    text += f", threads: {info['threads']}, medians of interleaved rounds"
    if not time and any(row["row"] == "static_e2" for row in rows):
        dotted = "dotted: always the costly branch, without a gate; hollow diamond: share above "
        text = f"{dotted}which that is faster.  {text}"
    if not time and any(row["row"] == "predicted" for row in rows):
        text = f"line: predicted; dots: measured.  {text}"
    return text
