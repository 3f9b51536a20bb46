"""Stands in for ncu and compute-sanitizer in a rehearsal: takes their flags, measures nothing.

    python3 -m benchmarks.gpu.stub ncu FLAGS COMMAND ...

It refuses a flag that the stages are not known to use rightly, runs the command, and prints what
the stage reads, with "stub" where a figure would stand.
"""

import argparse
import csv
import subprocess
import sys

FLAGS = {
    "ncu": {
        "--clock-control": ("none",),
        "--csv": None,
        "--kernel-name": (),
        "--metrics": (),
        "--print-units": ("base",),
        "--target-processes": ("all",),
    },
    "compute-sanitizer": {
        "--error-exitcode": ("9",),
        "--kernel-name": ("kns=dynmm",),
        "--print-limit": (),
        "--report-api-errors": ("no",),
        "--tool": ("memcheck", "racecheck", "initcheck", "synccheck"),
    },
}


def main() -> int:
    tool = sys.argv[1]
    parser = argparse.ArgumentParser(f"stub of {tool}", allow_abbrev=False)
    for flag, values in FLAGS[tool].items():
        if values is None:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, choices=values or None)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    parsed = parser.parse_args(sys.argv[2:])
    print(f"STUB of {tool}: nothing is measured or checked", flush=True)
    status = subprocess.run(parsed.command).returncode
    if tool == "ncu":
        print_launches(parsed.metrics.split(","))
    return status


def print_launches(metrics: list[str]) -> None:
    """One launch between two marks, as the real tool's table has it."""
    table = csv.writer(sys.stdout, quoting=csv.QUOTE_ALL)
    table.writerow(["ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value"])
    for launch, kernel in enumerate(("spin_kernel", "stub", "spin_kernel")):
        for metric in metrics:
            table.writerow([launch, kernel, metric, "", "stub"])


if __name__ == "__main__":
    sys.exit(main())
