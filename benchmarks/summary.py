"""The few numbers a reader wants, one line per routed row."""

from collections.abc import Iterable
from typing import Any

from benchmarks.contest import Outcome

# Key of the summary row -> heading and format.
COLUMNS = {
    "kind": ("kind", "{}"),
    "workload": ("workload", "{}"),
    "n": ("N", "{}"),
    "p": ("p(E2)", "{:g}"),
    "row": ("row", "{}"),
    "routed_ms": ("routed ms", "{:.3f}"),
    "masked_ms": ("masked ms", "{:.3f}"),
    "realised": ("speed-up", "{:.2f}"),
    "ceiling": ("ceiling", "{:.2f}"),
    "realised_over_ceiling": ("realised", "{:.0%}"),
    "overhead": ("overhead", "{:.3f}"),
    "loop_over_routed": ("loop/routed", "{:.2f}"),
    "e2_over_routed": ("E2/routed", "{:.2f}"),
    "rounds": ("rounds", "{}"),
}

LEGEND = (
    "speed-up: masked / routed. ceiling: the same in multiply-accumulates. realised: their "
    "quotient.",
    "overhead: routed / bare (gate and branches on rows already gathered); 1 is free routing.",
    "loop: nonzero, index_select and index_copy by hand; in training it has the selected-only "
    "gradient.",
)


def summary_rows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    rows = []
    for outcome in outcomes:
        for row in outcome.seconds:
            if not row.startswith("routed") or "masked" not in outcome.seconds:
                continue
            info = outcome.info(row)
            info["routed_ms"] = outcome.milliseconds(row)
            info["masked_ms"] = outcome.milliseconds("masked")
            info["e2_over_routed"] = outcome.ratio("static_e2", row)
            info["rounds"] = len(outcome.seconds[row])
            rows.append({key: info[key] for key in COLUMNS})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Aligned lines: a heading, the rows, what the columns mean."""
    cells = [[heading for heading, _ in COLUMNS.values()]]
    for row in rows:
        cells.append(
            [
                "-" if row[key] is None else template.format(row[key])
                for key, (_, template) in COLUMNS.items()
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    ]
    return [*lines, "", *LEGEND]
