"""Builds the CUDA kernels for the emulator (cuda_runtime.h) as ops of their own namespace."""

import os
import re
import subprocess
from pathlib import Path
from unittest.mock import patch

import torch

from dynmm_kernels.ops.schemas import OPS

ROOT = Path(__file__).resolve().parents[3]
NAMESPACE = "dynmm_emulated"

_NAME = r"([A-Za-z_]\w*(?:<(?:[^<>;]|<[^<>;]*>)*>)?)"
_LAUNCH = re.compile(_NAME + r"\s*<<<(.*?)>>>\((.*?)\);", re.DOTALL)
_MOST_NARROW = re.compile(r"(kMostNarrow = )\w+;")
_DEVICE = """struct OnDevice {
  const Device device;
  explicit OnDevice(Device device) : device(device) {}
  cudaStream_t stream() const { return nullptr; }
};"""


def translate(text: str) -> str:
    """CUDA C++ as C++ for the emulator: launches, shared memory, the device, the registration."""
    text = _LAUNCH.sub(r"emulator::launch({\2}, [&] { \1(\3); });", text)
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = emulator::dynamic_shared<\1>();", text
    )
    text = re.sub(r"class OnDevice \{.*?\n\};", _DEVICE, text, flags=re.DOTALL)
    text = text.replace("STD_CUDA_KERNEL_LAUNCH_CHECK();", "")
    text = _MOST_NARROW.sub(r"\g<1>500;", text)  # so that small maps take the path of huge ones
    return text.replace("_IMPL(dynmm_kernels, CUDA, m)", f"_IMPL({NAMESPACE}, CPU, m)")


def build(folder: Path) -> torch.library.Library:
    """Compiles csrc/cuda into `folder` and loads it; keep what is returned as long as the ops."""
    (folder / "cuda").mkdir()
    sources = []
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        target = (
            folder / "cuda" / path.with_suffix({".cu": ".cpp"}.get(path.suffix, path.suffix)).name
        )
        target.write_text(translate(path.read_text()))
        if target.suffix == ".cpp":
            sources.append(str(target))
    library = torch.library.Library(NAMESPACE, "DEF")
    for op in OPS.values():
        library.define(op.schema)
    torch_folder = Path(torch.__file__).parent
    include, shared = torch_folder / "include", folder / "emulated.so"
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", "-w", "-ffp-contract=off"]
    # A GPU faults where an access is not aligned; so does this.
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    command += [f"-I{Path(__file__).parent}", f"-I{folder}", f"-I{ROOT / 'csrc'}", f"-I{include}"]
    command += [f"-I{include / 'torch/csrc/api/include'}", *sources, "-o", str(shared)]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the CUDA sources do not compile for the emulator:\n{result.stderr}")
    with patch.dict(os.environ, DYNMM_POISON="1"):  # read while the library is loaded
        torch.ops.load_library(str(shared))
    return library
