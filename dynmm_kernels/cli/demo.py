"""python -m dynmm_kernels demo: train a small DynMM on digits; dense, masked, routed.

Half a minute. Prints accuracy, cost and time of every way to run the same trained model, and draws
them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..demo import bench, digits, qmf, qmf_report, report, sweep
from .options import add_json, positive
from .progress import progress

EXAMPLES = """\
examples:
  python -m dynmm_kernels demo
  python -m dynmm_kernels demo --sweep --figure sweep.png
  python -m dynmm_kernels demo --epochs 5 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs",
        type=positive,
        help=f"of each stage; {bench.EPOCHS}, {sweep.EPOCHS} in the sweep, {qmf.EPOCHS} for QMF",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=positive, default=bench.ROUNDS, help="of the timing")
    parser.add_argument("--figure", type=Path, default=Path("dynmm_demo.png"), metavar="PATH")
    add_json(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--sweep",
        action="store_true",
        help="train with several weights of the cost, masked and routed (a few minutes)",
    )
    which.add_argument(
        "--qmf",
        action="store_true",
        help="late fusion, QMF, a gate and a calibrated cascade, clean and noisy (two minutes)",
    )


def run(arguments: argparse.Namespace) -> int:
    room: Any = sweep if arguments.sweep else qmf_report if arguments.qmf else report
    find = _sweep if arguments.sweep else _qmf if arguments.qmf else _experiment
    found: Any = find(arguments)
    drawn = room.draw(found, arguments.figure)
    if arguments.json:
        print(json.dumps(found, indent=2, default=asdict))
        return 0
    print(room.table(found))
    print(f"figure: {arguments.figure}" if drawn else "no figure: matplotlib is not installed")
    return 0


def _experiment(arguments: argparse.Namespace) -> report.Report:
    epochs = arguments.epochs or bench.EPOCHS
    total = len(digits.RATES) * epochs + arguments.rounds
    with progress(total, quiet=arguments.json) as advance:
        return bench.experiment(epochs, arguments.seed, arguments.rounds, advance)[0]


def _sweep(arguments: argparse.Namespace) -> list[sweep.Point]:
    epochs = arguments.epochs or sweep.EPOCHS
    seeds = [arguments.seed + i for i in range(sweep.SEEDS)]
    total = len(seeds) * (1 + 2 * len(sweep.COST_WEIGHTS)) * epochs
    with progress(total, quiet=arguments.json) as advance:
        return sweep.sweep(epochs, seeds, advance=advance)


def _qmf(arguments: argparse.Namespace) -> qmf_report.Report:
    epochs = arguments.epochs or qmf.EPOCHS
    total = qmf.SEEDS * (len(qmf.LATE) + 1 + arguments.rounds)
    with progress(total, quiet=arguments.json) as advance:
        return qmf.experiment(epochs, arguments.seed, qmf.SEEDS, arguments.rounds, advance)
