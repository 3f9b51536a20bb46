"""The GPU's tests in parallel: `correct` without Triton, `triton` with nothing else."""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile

from benchmarks.gpu.harvest import FAILED, ROOT, WRONG, begin, options

CHOSEN = {"correct": "not triton and not reference", "triton": "triton"}
WORKERS = {"correct": 6, "triton": 14}  # Triton compiles on the CPU, the GPU is shared
SECONDS = {"correct": 60, "triton": 100}  # for one test


def command(part: str) -> list[str]:
    """As parallel, and with as short a patience, as the plug-ins that are there allow."""
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail", "30"]
    line += ["tests/ops/test_gpu.py", "-k", CHOSEN[part]]
    if importlib.util.find_spec("xdist"):
        line += ["-n", str(min(WORKERS[part], len(os.sched_getaffinity(0))))]
    if importlib.util.find_spec("pytest_timeout"):
        line += ["--timeout", str(SECONDS[part])]
    return line


def main(part: str) -> int:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        status = subprocess.run(command(part), cwd=ROOT, env=environment).returncode
    if status == 1 and part == "correct":
        return WRONG
    return FAILED if status else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=[*CHOSEN])
    parsed = options(parser).parse_args()
    begin(parsed.part, parsed)
    sys.exit(main(parsed.part))
