"""python -m dynmm_kernels bench: small models routed, masked, dense and auto, on this machine.

Each has a gate, a cheap branch and a costly one; the samples that need the costly one are planned,
so that their share is exact. Every way is compared with plain PyTorch in fp64 before it is timed,
then all take turns.

  speed-up  of routed and auto, over masked execution
  ceiling   the speed-up that counted multiply-accumulates would allow
  overhead  routed time over that of gate and branches alone, on rows gathered before
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch

from ..measure.memory import keep_heap
from ..measure.racing import EXECUTIONS, TOLERANCE, Row, Setting, race
from ..measure.timing import Effort
from ..measure.workloads import WORKLOADS
from .options import add_json, add_timing, duration, positive, share
from .progress import progress

KINDS = "\n".join(f"  {name:11}{workload.what}" for name, workload in WORKLOADS.items())
EXAMPLES = f"""\
workloads:
{KINDS}

examples:
  python -m dynmm_kernels bench
  python -m dynmm_kernels bench --workload images --batch 8 32 --shares 0.1 0.5 0.9 --training
  python -m dynmm_kernels bench --json > bench.json && python -m dynmm_kernels plot bench.json
"""

Found = list[tuple[Setting, list[Row]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", choices=[*WORKLOADS], default="features", help="see below")
    parser.add_argument("--batch", type=positive, nargs="+", default=[128], help="default 128")
    parser.add_argument(
        "--shares",
        type=share,
        nargs="+",
        default=[0.0, 0.1, 0.5, 1.0],
        help="of the samples that need the costly branch; default 0 0.1 0.5 1",
    )
    parser.add_argument(
        "--execution",
        choices=EXECUTIONS,
        nargs="+",
        default=[*EXECUTIONS],
        help="default: all; masked is always among them",
    )
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    add_timing(parser, 15, 5.0, "of each batch and share")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_heap()
    effort = Effort(
        arguments.seconds, (min(3, arguments.rounds), arguments.rounds), sample=5e-3, warm=True
    )
    settings = [
        Setting(arguments.workload, batch, share, arguments.training, arguments.device)
        for batch in arguments.batch
        for share in arguments.shares
    ]
    with progress(len(settings) * effort.rounds[1], quiet=arguments.json) as advance:
        found = [(s, race(s, arguments.execution, effort, advance)) for s in settings]
    print(json.dumps(facts(found), indent=2) if arguments.json else table(found))
    return 1 if any(row.seconds is None for _, rows in found for row in rows) else 0


def table(found: Found) -> str:
    """A line for each batch and share."""
    setting, rows = found[0]
    names = [row.execution for row in rows]
    head = f"{'batch':>6}{'costly':>8}" + "".join(f"{name:>11}" for name in names)
    head += "".join(f"{name + ' x':>11}" for name in names if name in ("routed", "auto"))
    head += f"{'ceiling':>9}{'overhead':>10}" if "routed" in names else ""
    mode = "training step" if setting.training else "inference"
    workload = WORKLOADS[setting.workload]
    where = f"{setting.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [f"{setting.workload}: {workload.what}; {mode}; {where}", "", head, "-" * len(head)]
    for setting, rows in found:
        line = f"{setting.batch:6}{setting.costly / setting.batch:8.2f}"
        line += "".join(f"{_time(row):>11}" for row in rows)
        line += "".join(
            f"{_number(r.speedup):>11}" for r in rows if r.execution in ("routed", "auto")
        )
        for row in rows:
            if row.execution == "routed":
                line += f"{_number(row.ceiling):>9}{_number(row.overhead):>10}"
        lines.append(line)
    wrong = [(s, r) for s, rows in found for r in rows if r.seconds is None]
    lines += [
        f"WRONG, not timed: {row.execution}, batch {setting.batch}, share {setting.share:g}: "
        f"differs by {row.error:.1e} of the largest value, more than {TOLERANCE:g}"
        for setting, row in wrong
    ]
    return "\n".join(lines)


def _time(row: Row) -> str:
    return "wrong" if row.seconds is None else duration(row.seconds)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def facts(found: Found) -> dict[str, Any]:
    """For JSON."""
    rows = [
        {
            "workload": setting.workload,
            "kind": "training" if setting.training else "forward",
            "row": row.execution,
            "n": setting.batch,
            "p": setting.share,
            "active": setting.costly / setting.batch,
            "median_ms": None if row.seconds is None else 1e3 * row.seconds,
            **{k: v for k, v in asdict(row).items() if k not in ("execution", "seconds")},
        }
        for setting, rows in found
        for row in rows
    ]
    setting = found[0][0]
    return {
        "device": setting.device,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "macs": {name: WORKLOADS[name].macs for name in {setting.workload}},
        "rows": rows,
    }
