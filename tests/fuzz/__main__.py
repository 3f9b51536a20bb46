"""python -m tests.fuzz --minutes 5 --seed N [--only routed,nested] [--cases K], or --leaks N."""

import argparse
import sys
import warnings

import torch

from . import functional, layers, leaks, raw, routed, stacks
from .runner import Runner

PARTS = {
    "routed": routed.case,
    "nested": stacks.nested_case,
    "chained": stacks.chained_case,
    "skip": layers.skip_case,
    "exit": layers.exit_case,
    "functional": functional.case,
    "raw": raw.case,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; then one by one")
    parser.add_argument("--cases", type=int, help="of each part; default: as many as fit")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--keep", help="features to draw, all others plain; as printed")
    parser.add_argument("--failures", type=int, default=1, help="stop at so many kinds of them")
    parser.add_argument("--quiet", action="store_true", help="no table of features")
    parser.add_argument("--leaks", type=int, help="only calls every module so often")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.leaks:
        return check_leaks(options.leaks)
    runner = Runner({name: PARTS[name] for name in options.only.split(",")}, options.failures)
    keep = options.keep and [name.replace("_", " ") for name in options.keep.split(",")]
    runner.run(options.seed, options.cases, options.minutes * 60, keep)
    runner.report(not options.quiet)
    return 1 if runner.failures else 0


def check_leaks(calls: int) -> int:
    leaking = 0
    for name, learning, tensors, kib in leaks.report(calls):
        mode = "training" if learning else "eval"
        print(f"{name}, {mode}: {calls} calls, {tensors:+d} tensors, {kib:+d} KiB", flush=True)
        leaking += tensors > 0 or kib > leaks.NOISE_KIB
    return 1 if leaking else 0


if __name__ == "__main__":
    sys.exit(main())
