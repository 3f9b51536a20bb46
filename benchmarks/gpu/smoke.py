"""Every op once against the reference on the CPU, on memory that holds NaN, in its own process.

An access outside its memory ends the process on a GPU, and with it only the check of that op.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.gpu.cases import cases, difference, good_cases, to_device
from benchmarks.gpu.harvest import ROOT, WRONG, Harvest, begin, options
from dynmm_kernels import ops
from dynmm_kernels.ops.schemas import NAMESPACE, OPS

SECONDS = 45  # for one op, torch's start included


def problem_of(op: str, device: str, run: Callable[..., Any]) -> str | None:
    """The first call whose result is wrong, and how."""
    for case in (*good_cases(op, device), *cases(device, small=True, only=[op])):
        arguments = case.make()
        wanted = OPS[op].reference(*to_device(arguments, "cpu"))
        problem = difference(op, run(*arguments), wanted)
        if problem:
            return f"{case.title}: {problem}"
    return None


def one(op: str, device: str) -> int:
    """In a process of its own: what is wrong is the last line it prints."""
    torch.manual_seed(0)
    # Torch then fills what CUDA kernels allocate, DYNMM_POISON what those of the CPU do.
    torch.set_deterministic_debug_mode("warn")
    problem = problem_of(op, device, getattr(ops.kernels(), op))
    print(problem or "ok")
    return WRONG if problem else 0


def apart(op: str, harvest: Harvest) -> bool:
    """Whether `op` is right; runs it in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu.smoke", str(harvest.folder), "--op", op]
    command += ["--rehearse"] * harvest.rehearsal
    environment = {**os.environ, "DYNMM_POISON": "1"}
    said = {"cwd": ROOT, "capture_output": True, "text": True, "env": environment}
    try:
        run = subprocess.run(command, timeout=SECONDS, **said)
        lines = (run.stdout if run.returncode in (0, WRONG) else run.stderr).strip().splitlines()
        result = lines[-1] if lines else f"exit status {run.returncode}"
        if run.returncode == -signal.SIGINT:
            result = "cut"
    except subprocess.TimeoutExpired:
        result = f"not done after {SECONDS} s"
    key = "CPU" if harvest.rehearsal else "CUDA"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)
    harvest.write(op=op, result=result[:500], compiled=has_kernel)
    return result == "ok"


def main(harvest: Harvest) -> int:
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        right = [*pool.map(lambda op: apart(op, harvest), OPS)]
    return 0 if all(right) else WRONG


if __name__ == "__main__":
    parser = options(argparse.ArgumentParser())
    parser.add_argument("--op", help="only this, in this process")
    parsed = parser.parse_args()
    harvest = begin("smoke", parsed)
    sys.exit(one(parsed.op, harvest.device) if parsed.op else main(harvest))
