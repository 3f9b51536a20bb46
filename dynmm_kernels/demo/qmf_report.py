"""What the QMF demo found, as a table and as a figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NOISES = {  # how it is called: kind and severity of the noise
    "clean": ("gaussian", 0.0),
    # Ten grey levels for every step of epsilon, as in QMF's text-image code.
    "Gaussian 5": ("gaussian", 50.0),
    "Gaussian 10": ("gaussian", 100.0),
    "salt/pepper 5": ("salt_and_pepper", 5.0),
    "salt/pepper 10": ("salt_and_pepper", 10.0),
}
# Okabe and Ito's: they stay apart for colour-blind readers.
COLOURS = ("#888888", "#56b4e9", "#0072b2", "#e69f00", "#d55e00")


@dataclass(frozen=True)
class Row:
    """One line of the table; means over seeds."""

    method: str
    accuracy: dict[str, float]  # by noise, per cent
    macs: float  # millions of multiply-accumulates per clean digit
    time_ms: float  # for the clean test set


@dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...]
    guarantee: str  # of the calibrated cascade
    samples: int
    batch: int
    epochs: int
    seeds: int
    threads: int


def table(report: Report) -> str:
    """The report as plain text."""
    width = max(len(row.method) for row in report.rows)
    noises = "".join(f"{noise:>15}" for noise in NOISES)
    head = f"{'accuracy, %':{width}}{noises}{'MMACs/sample':>14}{'time':>10}"
    lines = [head, "-" * len(head)]
    for row in report.rows:
        scores = "".join(f"{row.accuracy[noise]:15.1f}" for noise in NOISES)
        spent = f"{row.macs:14.3f}{row.time_ms:7.1f} ms"
        lines.append(f"{row.method:{width}}{scores}{spent}")
    lines += [
        "",
        f"{report.samples} test digits in batches of {report.batch}, {report.threads} threads; "
        f"{report.epochs} epochs, means over {report.seeds} seeds.",
        "Under noise each of the two modalities of a digit is corrupted with probability one half.",
        report.guarantee,
        "That holds for clean digits: thresholds know nothing of noise they were not shown.",
    ]
    return "\n".join(lines)


def draw(report: Report, path: Path) -> bool:
    """Accuracy under growing noise, and the time that it takes; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    scores, spent = figure.subplots(1, 2, width_ratios=(5, 4))
    slowest = max(row.time_ms for row in report.rows)
    gaussian = {0: "clean", 5: "Gaussian 5", 10: "Gaussian 10"}
    for y, (row, colour) in enumerate(zip(report.rows, COLOURS, strict=True)):
        reached = [row.accuracy[noise] for noise in gaussian.values()]
        scores.plot([*gaussian], reached, "o-", color=colour, label=row.method)
        spent.barh(y, row.time_ms, height=0.6, color=colour)
        label = f"{row.time_ms:.0f} ms, {row.macs:.2f} MMACs"
        spent.text(row.time_ms + 0.02 * slowest, y, label, va="center")
    scores.set_xticks([*gaussian])
    scores.set_xlabel("severity of Gaussian noise, epsilon")
    scores.set_ylabel("test accuracy, %")
    scores.grid(axis="y", color="#eeeeee")
    scores.legend(frameon=False, loc="lower left", fontsize="small")
    spent.set_yticks([])
    spent.set_ylim(len(report.rows) - 0.5, -0.5)
    spent.set_xlim(0, 1.7 * slowest)
    spent.set_xlabel(f"time for {report.samples} clean digits, ms")
    for axes in (scores, spent):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.suptitle(
        "Two modalities, weighted by quality or asked one after the other", x=0.01, ha="left"
    )
    figure.savefig(path, dpi=150)
    return True
