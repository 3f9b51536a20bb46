"""One launch of every kernel under ncu: its time, what bounds it, how full the GPU was.

Where there is no ncu, or it brings nothing, torch's profiler times the same launches.
"""

import csv
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.each_kernel import MARK
from benchmarks.gpu.cases import cases, moved_bytes
from benchmarks.gpu.harvest import FAILED, ROOT, Harvest, begin
from dynmm_kernels import ops

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_pct",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_pct",
    "lts__t_sector_hit_rate.pct": "l2_hit_pct",
    "smsp__inst_executed.sum": "instructions",
    "launch__registers_per_thread": "registers",
}
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")


def kernel_names() -> list[str]:
    """Of every kernel in the CUDA sources."""
    texts = [path.read_text() for path in sorted((ROOT / "csrc/cuda").iterdir())]
    return sorted({name for text in texts for name in KERNEL.findall(text)})


def command(tool: list[str], rehearsal: bool) -> list[str]:
    watched = "|".join([MARK, *kernel_names()])
    flags = ["--clock-control", "none", "--csv", "--print-units", "base"]
    flags += ["--kernel-name", f"regex:{watched}", "--metrics", ",".join(METRICS)]
    program = [sys.executable, "-m", "benchmarks.each_kernel", "--marks"]
    return [*tool, *flags, *program, *["--device", "cpu", "--small"] * rehearsal]


def launches(lines: Iterable[str]) -> Iterator[tuple[int | None, dict[str, object]]]:
    """(number of the call, its kernel's name and metrics) from ncu's table, which may be wide.

    Calls stand between two marks; a launch outside of them made their arguments.
    """
    rows = [line for line in lines if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(rows):
        launch = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if "Metric Name" in row:
            launch[row["Metric Name"]] = row["Metric Value"]
        else:
            launch.update({name: row[name] for name in METRICS if name in row})
    marks = 0
    for launch in found.values():
        if MARK in launch["kernel"]:
            marks += 1
        elif marks % 2 and launch["kernel"]:
            metrics = {METRICS[name]: number(launch[name]) for name in METRICS if name in launch}
            yield marks // 2, {"kernel": launch["kernel"].split("(")[0], **metrics}


def number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def by_ncu(harvest: Harvest) -> bool:
    """Whether it brought anything."""
    tool = harvest.tool("ncu")
    if tool is None:
        harvest.write(tool="ncu is not there")
        return False
    table = harvest.folder / "kernels.csv"
    with table.open("w") as said:
        run = subprocess.run(command(tool, harvest.rehearsal), cwd=ROOT, stdout=said)
    titles = [(case.op, case.title) for case in cases(harvest.device, small=harvest.rehearsal)]
    lines = table.read_text().splitlines()
    table.unlink()
    print("\n".join(lines), flush=True)
    seen = 0
    for call, launch in launches(lines):
        op, title = titles[call] if call < len(titles) else ("?", "?")
        harvest.write(tool="stub" if harvest.rehearsal else "ncu", op=op, case=title, **launch)
        seen += 1
    if run.returncode or not seen:
        harvest.write(tool=f"ncu ended with {run.returncode} and {seen} launches; see the log")
    return seen > 0


def by_profiler(harvest: Harvest) -> None:
    """Times alone, of the second call of each case."""
    activity = ProfilerActivity.CPU if harvest.rehearsal else ProfilerActivity.CUDA
    for case in cases(harvest.device, small=harvest.rehearsal):
        run, arguments = getattr(ops.kernels(), case.op), case.make()
        size = moved_bytes(arguments, run(*arguments))
        with profile(activities=[activity]) as recorded:
            run(*arguments)
            if harvest.device == "cuda":
                torch.cuda.synchronize()
        for event in recorded.events():
            ours = "dynmm" in event.name
            if ours if harvest.rehearsal else event.device_type == DeviceType.CUDA:
                own = {"kernel": event.name[:100], "ns": 1e3 * event.time_range.elapsed_us()}
                harvest.write(tool="torch.profiler", op=case.op, case=case.title, bytes=size, **own)


def main(harvest: Harvest) -> int:
    torch.manual_seed(0)
    done = by_ncu(harvest)
    if not done or harvest.rehearsal:
        done = harvest.attempt("torch.profiler", lambda: by_profiler(harvest))
    return 0 if done else FAILED


if __name__ == "__main__":
    sys.exit(main(begin("kernels")))
