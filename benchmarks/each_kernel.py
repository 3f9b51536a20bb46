"""Every kernel once, for ncu, compute-sanitizer or torch's profiler to look at.

ncu ... python3 -m benchmarks.each_kernel --marks     # large calls; see gpu/kernels.py
python3 -m benchmarks.each_kernel --small             # small and odd ones, checked
python3 -m benchmarks.each_kernel --device cpu --small --only route
"""

import argparse
import sys

import torch

from benchmarks.gpu.cases import Case, cases, difference, to_device
from dynmm_kernels import ops
from dynmm_kernels.ops.schemas import OPS

MARK = "spin_kernel"  # what torch.cuda._sleep launches


def mark(device: str) -> None:
    """A launch that a profile is cut at: a call's kernels stand between two of them."""
    if device == "cuda":
        torch.cuda._sleep(1)


def wrong(case: Case, device: str) -> str | None:
    """The case run and compared with the reference on the CPU."""
    arguments = case.make()
    got = getattr(ops.kernels(), case.op)(*arguments)
    wanted = OPS[case.op].reference(*to_device(arguments, "cpu"))
    return difference(case.op, got, wanted)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.each_kernel", description=__doc__)
    parser.add_argument("--small", action="store_true", help="small calls, compared on the CPU")
    parser.add_argument("--marks", action="store_true", help="launch a mark around each call")
    parser.add_argument("--only", default="", help="ops, separated by commas")
    parser.add_argument("--device", default="cuda")
    parsed = parser.parse_args()
    torch.manual_seed(0)
    problems = 0
    for case in cases(parsed.device, parsed.small, [op for op in parsed.only.split(",") if op]):
        problem = None
        if parsed.small:
            problem = wrong(case, parsed.device)
        else:
            arguments = case.make()
            if parsed.marks:
                mark(parsed.device)
            getattr(ops.kernels(), case.op)(*arguments)
            if parsed.marks:
                mark(parsed.device)
        if parsed.device == "cuda":
            torch.cuda.synchronize()
        problems += problem is not None
        print(f"{case.op}: {case.title}: {problem or 'ran'}", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
