"""compute-sanitizer over our kernels, small calls, without the caching allocator.

Behind that allocator small tensors share a segment, and what is read beyond one looks valid.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu.harvest import FAILED, ROOT, Harvest, begin, options

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")  # two at a time, the first two first


def command(tool: str, sanitizer: list[str], harvest: Harvest, only: str) -> list[str]:
    flags = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    flags += ["--print-limit", "20"]
    if tool != "initcheck":  # which must see what other kernels wrote
        flags += ["--kernel-name", "kns=dynmm"]
    program = [sys.executable, "-m", "benchmarks.each_kernel", "--small", "--only", only]
    return [*sanitizer, *flags, *program, "--device", harvest.device]


def check(tool: str, harvest: Harvest, only: str) -> bool:
    sanitizer = harvest.tool("compute-sanitizer")
    if sanitizer is None:
        harvest.write(tool=tool, result="compute-sanitizer is not there")
        return False
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    path = harvest.folder / f"{tool}.txt"
    with path.open("w") as said:
        line = command(tool, sanitizer, harvest, only)
        status = subprocess.run(
            line, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
        ).returncode
    lines = path.read_text().splitlines()
    path.unlink()
    print("\n".join(lines), flush=True)
    ran = sum(text.endswith(": ran") for text in lines)
    summary = [text for text in lines if "SUMMARY" in text or "STUB" in text]
    found = {0: "nothing found", 9: "FOUND ERRORS"}.get(status, f"ended with {status}")
    if harvest.rehearsal and not status:
        found = "stub: nothing checked"
    harvest.write(tool=tool, result=found, calls=ran, summary=summary[-1:])
    return status == 0 and ran > 0


def main(harvest: Harvest, only: str) -> int:
    tools = TOOLS[:2] if harvest.rehearsal else TOOLS
    with ThreadPoolExecutor(2) as pool:
        clean = [*pool.map(lambda tool: check(tool, harvest, only), tools)]
    return 0 if all(clean) else FAILED


if __name__ == "__main__":
    parser = options(argparse.ArgumentParser())
    parser.add_argument("--only", default="", help="ops, separated by commas")
    parsed = parser.parse_args()
    sys.exit(main(begin("sanitize", parsed), parsed.only))
