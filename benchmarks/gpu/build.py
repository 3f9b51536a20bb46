"""Builds the kernels in place, unless they were carried along, and says on what they will run."""

import importlib.util
import os
import runpy
import subprocess
import sys

import torch

from benchmarks.gpu.harvest import FAILED, ROOT, Harvest, begin

CHECK = "from dynmm_kernels import ops; print(ops.compiled{}.reason or 'built')"


def state(suffix: str = "_cuda") -> str:
    """The word built, or the reason why not; asked of a process that then has it loaded."""
    command = [sys.executable, "-W", "ignore", "-c", CHECK.format(suffix)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (run.stdout or run.stderr).strip() or f"exit status {run.returncode}"


def build() -> int:
    environment = {"MAX_JOBS": str(os.cpu_count()), **os.environ}
    if torch.cuda.is_available():
        architecture = "{}.{}".format(*torch.cuda.get_device_capability())
        environment.setdefault("TORCH_CUDA_ARCH_LIST", architecture)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def machine() -> dict[str, object]:
    facts: dict[str, object] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    marks = runpy.run_path(str(ROOT / "dynmm_kernels/ops/fingerprint.py"))
    facts["sources"] = marks["fingerprint"](ROOT / "csrc")
    facts["cores"] = len(os.sched_getaffinity(0))
    facts["there"] = [name for name in ("triton", "xdist") if importlib.util.find_spec(name)]
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        facts |= {"gpu": device.name, "memory_gb": round(device.total_memory / 1e9)}
        facts |= {"sms": device.multi_processor_count, "l2_mb": round(device.L2_cache_size / 1e6)}
        query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        facts["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return facts


def main(harvest: Harvest) -> int:
    harvest.write(**machine())
    carried = not harvest.rehearsal and state() == "built"
    status = 0 if carried else build()
    cuda, cpu = state(), state("")
    harvest.write(cuda="carried" if carried else cuda, cpu=cpu)
    if status or (not harvest.rehearsal and cuda != "built"):
        print(f"the CUDA kernels were not built: {cuda}")
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(begin("build")))
