"""python -m dynmm_kernels plot: speed-up over masked against the share of samples that need E2.

A filled diamond marks where routed breaks even with masked, a hollow one where it breaks even
with running E2 for everyone and no gate.

    pytest benchmarks/ --benchmark-only --benchmark-json results.json
    python -m dynmm_kernels plot results.json -o speedup.png

Writes a PNG, and an SVG and a CSV beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

# Okabe and Ito's palette, which survives the common colour blindnesses; one colour per batch size.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#666666"

TITLES = {
    ("imdb", "forward"): "MM-IMDB, inference",
    ("imdb", "training"): "MM-IMDB, training step",
    ("mosei", "forward"): "CMU-MOSEI, inference",
    ("mosei", "training"): "CMU-MOSEI, training step",
}
FIELDS = ("workload", "kind", "row", "n", "p", "active", "speedup", "ceiling", "median_ms")

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("-o", "--out", type=Path, help="default: beside the results, as .png")


def run(arguments: argparse.Namespace) -> int:
    out = arguments.out or arguments.results.with_suffix(".png")
    rows = read(arguments.results)
    plot(rows, out)
    write_csv(rows, out)
    print(*(out.with_suffix(suffix) for suffix in (".png", ".svg", ".csv")), sep="\n")
    return 0


def read(path: Path) -> list[Row]:
    """One row per benchmark that has a speed-up over masked."""
    rows = []
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        info = benchmark["extra_info"]
        if "workload" not in info or info["realised"] is None:
            continue
        rows.append(
            {
                "workload": info["workload"],
                "kind": info["kind"],
                "row": info["row"],
                "n": info["n"],
                "p": info["p"],
                "active": info["counts"][1] / info["n"],
                "speedup": info["realised"],
                "ceiling": info.get("ceiling"),
                "median_ms": 1e3 * benchmark["stats"]["median"],
                "info": info,
            }
        )
    return sorted(
        rows, key=lambda row: [row[field] for field in ("workload", "kind", "row", "n", "p")]
    )


def panels(rows: list[Row]) -> dict[tuple[str, str], dict[int, list[Row]]]:
    """(workload, kind) -> batch size -> its rows; only where routed has a curve to draw."""
    found: dict[tuple[str, str], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["workload"], row["kind"]][row["n"]].append(row)
    return {
        panel: batches
        for panel, batches in found.items()
        if any(len(points(batch, "routed")) > 1 for batch in batches.values())
    }


def points(batch: list[Row], row: str) -> list[tuple[float, float]]:
    """(active share, speed-up) of one row of one batch size, by active share."""
    return sorted((r["active"], r["speedup"]) for r in batch if r["row"] == row)


def ceiling_curve(info: Row) -> tuple[list[float], list[float]]:
    """The ceiling for any active share, from the costs beside a result."""
    gate, (e1, e2) = info["macs_gate"], info["macs_branches"]
    shares = [i / 100 for i in range(101)]
    every = gate + e1 + e2
    chosen = [gate + e1 * (1 - share) + e2 * share for share in shares]
    if info["kind"] == "forward":
        return shares, [every / cost for cost in chosen]
    # straight_through: everything forward once, the gate and the chosen backward twice
    return shares, [3 * every / (every + 2 * cost) for cost in chosen]


def crossing(curve: list[tuple[float, float]], level: float = 1.0) -> float | None:
    """The active share at which a falling curve first reaches ``level``, by interpolation."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y0 >= level > y1:
            return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return None


def draw(axes: Any, panel: tuple[str, str], batches: dict[int, list[Row]]) -> None:
    shares, limits = ceiling_curve(next(iter(batches.values()))[0]["info"])
    axes.plot(shares, limits, color=GREY, linestyle="--", linewidth=1.2)
    note(axes, "FLOP ceiling", (shares[20], limits[20]), (6, 4), GREY)
    axes.axhline(1, color="black", linewidth=1)
    note(axes, "masked = dense = 1", (0, 1), (0, -12), "black")

    ends = []
    for colour, (n, batch) in zip(COLOURS, sorted(batches.items()), strict=False):
        curve = points(batch, "routed")
        axes.plot(*zip(*curve, strict=True), color=colour, marker="o", linewidth=1.5)
        ends.append((curve[-1], f"N = {n}", colour))
        if (even := crossing(curve)) is not None:
            axes.plot(even, 1, marker="D", color=colour, markeredgecolor="black", markersize=8)
            note(axes, f"break-even {even:.2f}", (even, 1), (4, 6), colour)
        static = points(batch, "static_e2")
        if static:
            level = median(speedup for _, speedup in static)
            axes.axhline(level, color=colour, linewidth=0.8, linestyle=":")
            even = crossing(curve, level)
            if even is not None:
                axes.plot(even, level, marker="D", color="white", markeredgecolor=colour)
                note(axes, f"{even:.2f}", (even, level), (2, 5), colour)
    lowest = 0.0
    for (x, y), text, colour in sorted(ends):
        lowest = max(y, 1.1 * lowest)
        note(axes, text, (x, lowest), (7, -3), colour)

    axes.set_title(TITLES.get(panel, " ".join(panel)), loc="left", fontweight="bold")
    axes.set_xlabel("share of samples that need E2")
    axes.set_xlim(-0.03, 1.18)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.8, low), high)
    axes.set_yticks([tick for tick in (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8) if low <= tick <= high])
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.spines[["top", "right"]].set_visible(False)


def note(
    axes: Any, text: str, at: tuple[float, float], shift: tuple[int, int], colour: str
) -> None:
    axes.annotate(text, at, shift, textcoords="offset points", color=colour, fontsize=9)


def plot(rows: list[Row], out: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(f"plot needs matplotlib ({error}): pip install '.[plot]'") from None
    drawn = panels(rows)
    if not drawn:
        raise SystemExit("plot: no workload has routed rows at two gate probabilities")
    figure = Figure(figsize=(5.2 * len(drawn), 4.2), layout="constrained")
    grid = figure.subplots(1, len(drawn), squeeze=False)
    for axes, (panel, batches) in zip(grid[0], drawn.items(), strict=True):
        draw(axes, panel, batches)
    grid[0][0].set_ylabel("speed-up of routed over masked")
    info = next(iter(next(iter(drawn.values())).values()))[0]["info"]
    figure.supxlabel(
        "dotted: always E2, without a gate; hollow diamond: share above which that is faster.  "
        f"{info['device']}, {info['dtype']}, threads: {info['threads']}, medians of interleaved "
        "rounds",
        fontsize=8,
        color=GREY,
    )
    figure.savefig(out.with_suffix(".png"), dpi=150)
    figure.savefig(out.with_suffix(".svg"))


def write_csv(rows: list[Row], out: Path) -> None:
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
