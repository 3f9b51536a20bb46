"""What was measured, as rows to draw: out of the JSON of pytest-benchmark, bench or profile."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .options import Mistake

FIELDS = ("workload", "kind", "row", "n", "p", "active", "speedup", "ceiling", "median_ms")
WANTED = "what --benchmark-json, bench --json or profile --json wrote"

Row = dict[str, Any]  # FIELDS, and info: macs_gate, macs_branches, device, dtype, threads


def read(path: Path) -> list[Row]:
    """One row per speed-up over masked.

    Raises:
        Mistake: no such file, or another one.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise Mistake(f"{path} is no JSON; wanted {WANTED}") from None
    readers = {"benchmarks": _benchmarks, "rows": _bench, "profiles": _profile}
    keys = [key for key in readers if isinstance(found, dict) and key in found]
    if not keys:
        raise Mistake(f"{path} holds nothing to draw; wanted {WANTED}")
    rows = [row for row in readers[keys[0]](found) if row["speedup"] is not None]
    return sorted(
        rows, key=lambda row: [row[f] for f in ("workload", "kind", "row", "n", "active")]
    )


def _benchmarks(found: Any) -> Iterator[Row]:
    for benchmark in found["benchmarks"]:
        info = benchmark["extra_info"]
        if "workload" in info:
            yield {
                **{field: info[field] for field in ("workload", "kind", "row", "n", "p")},
                "active": info["counts"][1] / info["n"],
                "speedup": info["realised"],
                "ceiling": info.get("ceiling"),
                "median_ms": 1e3 * benchmark["stats"]["median"],
                "info": info,
            }


def _bench(found: Any) -> Iterator[Row]:
    for row in found["rows"]:
        gate, *branches = found["macs"][row["workload"]]
        about = {field: found[field] for field in ("device", "dtype", "threads")}
        info = about | {"macs_gate": gate, "macs_branches": branches}
        yield {field: row[field] for field in FIELDS} | {"info": info}


def _profile(found: Any) -> Iterator[Row]:
    """The forecast as row "predicted", what was measured as "routed"."""
    for profile in found["profiles"]:
        costly = profile["branches"].index(profile["costly"])
        *routed, masked = profile["checks"]
        same = {
            "workload": found["factory"],
            "kind": profile["kind"],
            "n": profile["batch"],
            "ceiling": None,
            "info": {field: found[field] for field in ("device", "threads")},
        }
        for share, speedup in profile["speedup_by_share"]:
            yield _point(same, "predicted", share, speedup, None)
        for check in routed:
            speedup = masked["measured_ms"] / check["measured_ms"]
            yield _point(same, "routed", check["shares"][costly], speedup, check["measured_ms"])
        for share in (0.0, 1.0):
            yield _point(same, "masked", share, 1.0, masked["measured_ms"])


def _point(same: Row, row: str, share: float, speedup: float, time: float | None) -> Row:
    return same | {
        "row": row,
        "p": share,
        "active": share,
        "speedup": speedup,
        "median_ms": time,
    }


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


def points(batch: list[Row], row: str, value: str = "speedup") -> list[tuple[float, float]]:
    """(active share, value) of one row of one batch size, by active share."""
    return sorted((r["active"], r[value]) for r in batch if r["row"] == row and r[value])


def ceiling_curve(info: Row, kind: str) -> list[tuple[float, float]]:
    """The ceiling for any active share, from the costs beside a result; empty without."""
    if "macs_gate" not in info:
        return []
    gate, (e1, e2) = info["macs_gate"], info["macs_branches"]
    shares = [i / 100 for i in range(101)]
    every = gate + e1 + e2
    chosen = [gate + e1 * (1 - share) + e2 * share for share in shares]
    # straight_through: everything forward once, the gate and the chosen backward twice
    speedups = [
        every / cost if kind == "forward" else 3 * every / (every + 2 * cost) for cost in chosen
    ]
    return [*zip(shares, speedups, strict=True)]


def write_csv(rows: list[Row], out: Path) -> None:
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
