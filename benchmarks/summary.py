"""The few numbers a reader wants, one line per routed row."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import cascade, energy, history
from benchmarks.contest import Outcomes
from benchmarks.nested import StackSetting
from benchmarks.problem import BARE, Setting

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

STACK_COLUMNS = {
    "setting": ("setting", "{}"),
    "routed_s": ("routed s", "{:.3f}"),
    "masked_s": ("masked s", "{:.3f}"),
    "realised": ("speed-up", "{:.2f}"),
    "ceiling": ("ceiling", "{:.2f}"),
    "realised_over_ceiling": ("realised", "{:.0%}"),
    "overhead": ("overhead", "{:.3f}"),
    "static_over_routed": ("static/routed", "{:.2f}"),
    "peak_over_masked": ("peak/masked", "{:.2f}"),
    "rounds": ("rounds", "{}"),
}

STACK_LEGEND = (
    "overhead: routed / bare (every module on rows prepared beforehand). static: depth always "
    "fused,",
    "without a gate. peak: of the memory that a run allocates.",
)


CASCADE_COLUMNS = {
    "setting": ("setting", "{}"),
    "row": ("row", "{}"),
    "cascade_ms": ("cascade ms", "{:.1f}"),
    "full_ms": ("full ms", "{:.1f}"),
    "realised": ("speed-up", "{:.2f}"),
    "ceiling": ("ceiling", "{:.2f}"),
    "realised_over_ceiling": ("realised", "{:.0%}"),
    "overhead": ("overhead", "{:.3f}"),
    "rounds": ("rounds", "{}"),
}

CASCADE_LEGEND = (
    "speed-up: full (both encoders on all samples, as QMF runs them) / cascade. forced: exits are",
    "given, nothing is scored. overhead: cascade / bare (encoders, score, fusion on rows gathered",
    "before).",
)

ENERGY_COLUMNS = {
    "setting": ("setting", "{}"),
    "ours_us": ("us", "{:.1f}"),
    "torch_over_ours": ("torch/ours", "{:.2f}"),
    "compiled_over_ours": ("compiled/ours", "{:.2f}"),
    "ours_over_clone": ("ours/clone", "{:.2f}"),
    "rounds": ("rounds", "{}"),
}

ENERGY_LEGEND = (
    "losses: with targets. training: and backward. compiled: the PyTorch expression under "
    "torch.compile",
    "(--bench-compile). clone: copying the logits.",
)

HISTORY_COLUMNS = {
    "setting": ("setting", "{}"),
    "ours_us": ("us", "{:.1f}"),
    "numpy_us": ("numpy us", "{:.1f}"),
    "numpy_over_ours": ("numpy/ours", "{:.2f}"),
    "rounds": ("rounds", "{}"),
}

HISTORY_LEGEND = ("A step: the losses of a batch recorded, the ranking loss of its confidences.",)

# Name -> its settings, the rows that are ours, and how they are shown.
QMF = {
    "cascades": (cascade.CascadeSetting, cascade.OURS, CASCADE_COLUMNS, CASCADE_LEGEND),
    "energy_fuse": (energy.EnergySetting, energy.OURS, ENERGY_COLUMNS, ENERGY_LEGEND),
    "history": (history.HistorySetting, history.OURS, HISTORY_COLUMNS, HISTORY_LEGEND),
}


def qmf_rows(outcomes: Outcomes) -> dict[str, list[dict[str, Any]]]:
    """By the names of `QMF`."""
    return {
        name: [
            {
                "setting": str(setting),
                "row": row,
                **setting.gains(outcome, row),
                "rounds": len(outcome.seconds[row]),
            }
            for setting, outcome in outcomes.items()
            if isinstance(setting, kind)
            for row in ours
            if row in outcome.seconds
        ]
        for name, (kind, ours, _, _) in QMF.items()
    }


def qmf_tables(outcomes: Outcomes) -> list[str]:
    """One below the other."""
    lines: list[str] = []
    for name, rows in qmf_rows(outcomes).items():
        _, _, columns, legend = QMF[name]
        shown = table(rows, columns, legend)
        lines += ["", *shown] if lines and shown else shown
    return lines


def stack_rows(outcomes: Outcomes) -> list[dict[str, Any]]:
    return [
        {
            "setting": str(setting),
            **setting.gains(outcome),
            "rounds": len(outcome.seconds["routed"]),
        }
        for setting, outcome in outcomes.items()
        if isinstance(setting, StackSetting) and outcome.seconds
    ]


def summary_rows(outcomes: Outcomes) -> list[dict[str, Any]]:
    rows = []
    for setting, outcome in outcomes.items():
        if not isinstance(setting, Setting) or "masked" not in outcome.seconds:
            continue
        for row in [row for row in BARE if row in outcome.seconds]:
            info = setting.info(outcome, row)
            info["routed_ms"] = 1e3 * outcome.median(row)
            info["masked_ms"] = 1e3 * outcome.median("masked")
            info["e2_over_routed"] = outcome.ratio("static_e2", row)
            info["rounds"] = len(outcome.seconds[row])
            rows.append({key: info[key] for key in COLUMNS})
    return rows


def table(
    rows: list[dict[str, Any]],
    columns: Mapping[str, tuple[str, str]] = COLUMNS,
    legend: Sequence[str] = LEGEND,
) -> list[str]:
    """Aligned lines: a heading, the rows, what the columns mean; nothing without rows."""
    if not rows:
        return []
    cells = [[heading for heading, _ in columns.values()]]
    for row in rows:
        cells.append(
            [
                "-" if row[key] is None else template.format(row[key])
                for key, (_, template) in columns.items()
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    ]
    return [*lines, "", *legend]
