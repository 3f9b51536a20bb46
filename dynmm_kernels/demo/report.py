"""What the demo found, as a table and as a figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Blue, vermilion and grey stay apart for colour-blind readers.
ROUTED, OTHER = "#0072b2", "#b0b0b0"
TICK: dict[str, Any] = {
    "color": "#d55e00",
    "marker": "|",
    "linestyle": "none",
    "markersize": 18,
    "markeredgewidth": 2.5,
}


@dataclass(frozen=True)
class Row:
    """One line of the table: what one way of running the model gives and costs."""

    mode: str
    accuracy: float  # per cent
    shares: tuple[float, ...]  # of the samples, or of the soft weights in dense mode
    macs: float  # millions of multiply-accumulates per sample, gate included where it runs
    time_ms: float  # median over the whole test set
    speedup: float  # over masked
    ceiling: float  # the speed-up that the MACs alone would allow


@dataclass(frozen=True)
class Report:
    rows: tuple[Row, ...]
    parity: float  # largest |routed - masked| over the logits, relative to the largest logit
    samples: int
    batch: int
    train_seconds: float
    epochs: int
    seed: int
    threads: int

    def row(self, mode: str) -> Row:
        return next(row for row in self.rows if row.mode == mode)


def table(report: Report) -> str:
    """The report as plain text."""
    head = (
        f"{'':10} {'accuracy':>8} {'E1 / E2 share':>15} {'MMACs/sample':>13} {'time':>9} "
        f"{'speed-up':>9} {'ceiling':>8}"
    )
    lines = [head, "-" * len(head)]
    for row in report.rows:
        share = f"{100 * row.shares[0]:.1f} / {100 * row.shares[1]:.1f} %"
        lines.append(
            f"{row.mode:10} {row.accuracy:6.1f} % {share:>15} {row.macs:13.3f} "
            f"{row.time_ms:6.1f} ms {row.speedup:8.2f}x {row.ceiling:7.2f}x"
        )
    lines += [
        "",
        f"{report.samples} test digits in batches of {report.batch}, {report.threads} threads; "
        f"trained for 2 x {report.epochs} epochs in {report.train_seconds:.0f} s, "
        f"seed {report.seed}.",
        "Speed-up over masked; its ceiling from MACs alone, which the smaller batches of a branch",
        "can beat where they fit the cache better. Largest difference routed - masked: "
        f"{report.parity:.0e} of the largest logit.",
    ]
    return "\n".join(lines)


def draw(report: Report, path: Path) -> bool:
    """Accuracy and time of every mode, side by side; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    right, spent = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    slowest = max(row.time_ms for row in report.rows)
    masked = report.row("masked").time_ms
    for y, row in enumerate(report.rows):
        colour = ROUTED if row.mode == "routed" else OTHER
        right.plot(row.accuracy, y, "o", color=colour, markersize=9)
        right.text(row.accuracy, y - 0.25, f"{row.accuracy:.1f}", ha="center")
        spent.barh(y, row.time_ms, height=0.55, color=colour)
        by_macs = masked / row.ceiling
        label = f"{row.time_ms:.0f} ms, {row.speedup:.1f}x"
        spent.text(max(row.time_ms, by_macs) + 0.03 * slowest, y, label, va="center")
        spent.plot(by_macs, y, **TICK)
    right.set_yticks(range(len(report.rows)), [row.mode for row in report.rows])
    right.set_ylim(len(report.rows) - 0.5, -0.7)
    right.margins(x=0.15)
    right.set_xlabel("test accuracy, %")
    right.grid(axis="x", color="#eeeeee")
    spent.set_xlim(0, 1.4 * slowest)
    spent.set_xlabel(f"time for {report.samples} digits, ms, and speed-up over masked")
    spent.plot([], [], **TICK, label="by MACs alone")
    spent.legend(loc="lower right", frameon=False)
    for axes in (right, spent):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.suptitle("One trained model, five ways to run it", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    return True
