"""The harvest as a table of at most 60 lines: FOLDER/table.txt, and the screen."""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

LINES, WIDTH = 60, 130
Line = dict[str, Any]

OPS = {
    "op": ("op", "{}"),
    "case": ("case", "{}"),
    "us": ("us", "{:.1f}"),
    "gb_per_s": ("GB/s", "{:.0f}"),
    "of_copy": ("of copy", "{:.0%}"),
    "torch_over_ours": ("torch/ours", "{:.2f}"),
    "kernel_us": ("kernels us", "{:.1f}"),
    "dram_pct": ("dram %", "{:.0f}"),
    "issue_pct": ("issue %", "{:.0f}"),
}
MODELS = {
    "setting": ("model", "{}"),
    "dtype": ("dtype", "{}"),
    "masked": ("masked ms", "{:.3f}"),
    "routed": ("routed ms", "{:.3f}"),
    "realised": ("speed-up", "{:.2f}"),
    "ceiling": ("ceiling", "{:.2f}"),
    "overhead": ("overhead", "{:.3f}"),
    "loop_over_routed": ("loop/routed", "{:.2f}"),
}


def read(folder: Path) -> dict[str, list[Line]]:
    """Stage -> its lines; a line that a stage had no time to finish is left out."""
    stages: dict[str, list[Line]] = defaultdict(list)
    path = folder / "harvest.jsonl"
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        stages[line["stage"]].append(line)
    return stages


def report(stages: dict[str, list[Line]], limit: int = LINES) -> list[str]:
    stages = defaultdict(list, stages)
    every = [line for lines in stages.values() for line in lines]
    said = []
    if any(line.get("rehearsal") for line in every):
        said += ["REHEARSAL without a GPU: no figure below is one of a GPU"]
    said += machine(stages["build"])
    ended = [line for line in every if "state" in line]
    said += folded([f"{line['stage']} {line['state']} {line['seconds']} s" for line in ended])
    said += troubles(every)[:12]
    roofs = [line for line in stages["roofs"] if "roof" in line]
    said += folded([roof(line) for line in roofs])
    said += host(stages["host"])
    ops, models = op_rows(stages), model_rows(stages["models"])
    left = limit - len(said) - 4  # a blank line and a heading each
    said += section(ops, OPS, max(min(len(ops), left // 2), left - len(models)))
    said += section(models, MODELS, limit - len(said) - 2)
    return [line[:WIDTH] for line in said[:limit]]


def section(rows: list[Line], columns: dict[str, tuple[str, str]], room: int) -> list[str]:
    """A table of so many rows; the last line says what there was no room for."""
    if not rows or room < 1:
        return []
    shown = rows if len(rows) <= room else rows[: room - 1]
    cells = [[heading for heading, _ in columns.values()]]
    for row in shown:
        pairs = [(row.get(key), template) for key, (_, template) in columns.items()]
        cells.append(["-" if value is None else form.format(value) for value, form in pairs])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    ]
    left_out = len(rows) - len(shown)
    return ["", *lines, *[f"... {left_out} more in harvest.jsonl"] * bool(left_out)]


def machine(lines: list[Line]) -> list[str]:
    facts: Line = {}
    for line in lines:
        facts |= line
    names = ("gpu", "torch", "python", "cores", "nvidia_smi", "cuda", "commit", "sources")
    return folded([f"{name} {facts[name]}" for name in names if name in facts])


def folded(parts: list[str]) -> list[str]:
    """The parts side by side, in lines of the width."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 3 <= WIDTH:
            lines[-1] += f" | {part}"
        else:
            lines.append(part)
    return lines


def troubles(lines: list[Line]) -> list[str]:
    """What was wrong, what failed, what the sanitizers found."""
    found = []
    for line in lines:
        where = " ".join(str(line[key]) for key in ("op", "case", "setting", "row") if key in line)
        if line.get("wrong"):
            found.append(f"WRONG {line['stage']} {where}: {line['wrong']}")
        elif line.get("failed"):
            found.append(f"failed {line['stage']} {line['failed']}: {line['error']}")
        elif line["stage"] == "smoke" and line.get("result", "ok") != "ok":
            found.append(f"smoke {where}: {line['result']}")
        elif line["stage"] == "sanitize" and "result" in line:
            found.append(f"{line['tool']}: {line['result']}")
        elif line["stage"] == "smoke" and line.get("compiled") is False:
            found.append(f"{line['op']} has no compiled kernel; the reference ran")
    return found


def roof(line: Line) -> str:
    if "gb_per_s" in line:
        return f"{line['roof']} {line['gb_per_s']:.0f} GB/s"
    return f"{line['roof']} {line['us']:.1f} us"


def host(lines: list[Line]) -> list[str]:
    """Routed, and in brackets what it has above the bare calls."""
    rows: dict[tuple[str, bool], dict[str, Line]] = defaultdict(dict)
    for line in lines:
        if "row" in line:
            rows[line["workload"], line["training"]][line["row"]] = line
    said = []
    for (workload, training), kinds in rows.items():
        routed, bare = kinds.get("routed"), kinds.get("bare")
        if not routed or not bare:
            continue
        counted = ("launches", "copies", "waits", "allocations")
        parts = [f"{what} {routed[what]} ({routed[what] - bare[what]:+d})" for what in counted]
        if "idle_us" in routed:
            parts.append(f"GPU idle {routed['idle_us']:.0f} of {routed['gpu_us']:.0f} us")
        spent = kinds.get("phases", {}).get("us", {})
        parts += [f"host {sum(spent.values()):.0f} us, ours {spent.get('rest', 0):.0f}"] * bool(
            spent
        )
        mode = "training" if training else "eval"
        said.append(f"{workload} N={routed['n']} {mode}: {', '.join(parts)}")
    return said


def op_rows(stages: dict[str, list[Line]]) -> list[Line]:
    """Of each op the fastest and the slowest case by bandwidth, with what the profiler saw."""
    copies = [line["gb_per_s"] for line in stages["roofs"] if "roof" in line and "gb_per_s" in line]
    kernels: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in stages["kernels"]:
        if line.get("ns") is not None:
            kernels[line["op"], line["case"]].append(line)
    by_op: dict[str, list[Line]] = defaultdict(list)
    for line in stages["roofs"]:
        if "us" in line and "op" in line:
            by_op[line["op"]].append(line)
    rows = []
    for lines in by_op.values():
        lines = sorted(lines, key=lambda line: -line["gb_per_s"])
        rows += [op_row(line, kernels, copies) for line in (lines[0], lines[-1])[: len(lines)]]
    return rows


def op_row(line: Line, kernels: dict[tuple[str, str], list[Line]], copies: list[float]) -> Line:
    seen = kernels[line["op"], line["case"]]
    longest = max(seen, key=lambda launch: launch["ns"], default={})
    torch_us = line.get("torch_us")
    return {
        **line,
        "of_copy": line["gb_per_s"] / copies[0] if copies else None,
        "torch_over_ours": torch_us / line["us"] if torch_us else None,
        "kernel_us": sum(launch["ns"] for launch in seen) / 1e3 if seen else None,
        "dram_pct": longest.get("dram_pct"),
        "issue_pct": longest.get("issue_pct"),
    }


def model_rows(lines: list[Line]) -> list[Line]:
    settings: dict[tuple[str, str], dict[str, Line]] = defaultdict(dict)
    for line in lines:
        if "ms" in line:
            settings[line["setting"], line["dtype"]][line["row"]] = line
    rows = []
    for (setting, dtype), kinds in settings.items():
        routed = kinds.get("routed")
        if routed is None:
            continue
        loop, masked = kinds.get("loop"), kinds.get("masked")
        rows.append(
            {
                "setting": setting,
                "dtype": dtype,
                "masked": masked and masked["ms"],
                "routed": routed["ms"],
                "loop_over_routed": loop and loop["ms"] / routed["ms"],
                **{key: routed.get(key) for key in ("realised", "ceiling", "overhead")},
            }
        )
    return rows


def wrong_ops(stages: dict[str, list[Line]]) -> list[str]:
    """Which ops gave a wrong result, where that is known."""
    fine = ("ok", "cut")
    smoke = [line["op"] for line in stages["smoke"] if line.get("result", "ok") not in fine]
    roofs = [line["op"] for line in stages["roofs"] if line.get("wrong")]
    return sorted({*smoke, *roofs})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wrong", action="store_true", help="only the ops that are wrong")
    parsed = parser.parse_args()
    stages = read(parsed.folder)
    if parsed.wrong:
        print(",".join(wrong_ops(stages)))
        return
    text = "\n".join(report(stages))
    (parsed.folder / "table.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
