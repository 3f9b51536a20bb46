"""The CUDA sources without a GPU: nvcc compiles every file; no spills, wide accesses.

Needs a CUDA toolkit (a CUDA build of torch is not needed) and the `triton` wheel, which carries
cuobjdump. Skipped where there is no toolkit, unless DYNMM_REQUIRE_NVCC=1.
"""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from dynmm_kernels.ops.toolkit import find_toolkit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90)
SHARED_BYTES = 48 * 1024  # what a kernel may use without asking for more

# Kernels whose rows must move 16 bytes at a time, by a part of their mangled name.
WIDE = {
    "gather_rows.cu": ("gather_bytes", "gather_scaledIfLi4E"),
    "combine_rows.cu": ("combine_bytesINS_4UnitImLi2EEE", "combine_sumsIfLi4E"),
    "row_dots.cu": ("row_dot_partsIfLi4E",),
    "se_add.cu": ("scale_and_addIfLi4E", "both_gradsIfLi4E"),
    "se_add_sums.cu": ("channel_sumsIfLi4E",),
    "energy_fuse.cu": ("fuse_rowsIfNS_5ShareILi4E", "fuse_rowsIN3c104HalfENS_5ShareILi8E"),
    "energy_fuse_grads.cu": ("grad_rowsIfNS_5ShareILi4E",),
}
LOAD, STORE = re.compile(r"\bLDG\.E\S*\.128"), re.compile(r"\bSTG\.E\S*\.128")


@pytest.fixture(scope="session")
def toolkit() -> Path:
    try:
        return find_toolkit()
    except LookupError as missing:
        if os.environ.get("DYNMM_REQUIRE_NVCC") == "1":
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def compiled(toolkit, tmp_path_factory, proved):
    """(source, architecture) -> (cubin, ptxas report); each is compiled once."""
    folder = tmp_path_factory.mktemp("cubins")
    include = Path(torch.__file__).parent / "include"
    done: dict[tuple[str, int], tuple[Path, str]] = {}

    def compile_once(source: str, architecture: int) -> tuple[Path, str]:
        if (source, architecture) not in done:
            cubin = folder / f"{source}.sm_{architecture}.cubin"
            code = f"arch=compute_{architecture},code=sm_{architecture}"
            command = [toolkit / "bin" / "nvcc", "-cubin", "-o", cubin, "-gencode", code]
            command += ["-std=c++20", "-O3", "--fmad=false", "-Xptxas", "-v", "-DUSE_CUDA"]
            command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"]
            command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
            command += [ROOT / "csrc" / "cuda" / source]
            result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-4000:]
            done[source, architecture] = cubin, result.stderr
        return done[source, architecture]

    yield compile_once
    kernels = sum(report.count("Compiling entry function") for _, report in done.values())
    proved(f"nvcc: {kernels} kernels of {len(SOURCES)} files for sm_80 and sm_90, no spills")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_no_local_memory(compiled, source, architecture):
    _, report = compiled(source, architecture)
    entries = report.split("Compiling entry function")[1:]
    assert entries
    for entry in entries:
        name = entry.split("'")[1]
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", entry)
        assert stack is not None, name
        assert stack.groups() == ("0", "0"), f"{name}: {stack[0]}"
        shared = re.search(r"(\d+) bytes smem", entry)
        assert shared is None or int(shared[1]) <= SHARED_BYTES, name
        registers = re.search(r"Used (\d+) registers", entry)
        assert registers is not None, name
        # With exp in fp64 it is arithmetic that takes the time, not memory.
        most = 128 if re.search(r"_rowsIdNS_5Share", name) else 64
        assert int(registers[1]) <= most, f"{name}: {registers[0]} leave too few blocks per SM"


def test_every_source_that_moves_rows_is_looked_at():
    """Indices alone move in route.cu."""
    assert {*WIDE, "route.cu"} == {path.name for path in (ROOT / "csrc/cuda").glob("*.cu")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(WIDE))
def test_wide_path_moves_16_bytes(compiled, source, architecture):
    cubin, _ = compiled(source, architecture)
    functions = sass(cubin)
    for part in WIDE[source]:
        bodies = [body for name, body in functions.items() if part in name]
        assert bodies, f"no kernel named {part}"
        for body in bodies:
            assert LOAD.search(body), f"{part}: no 128-bit load"
            if not part.startswith(("row_dot", "channel_sums")):
                assert STORE.search(body), f"{part}: no 128-bit store"


def sass(cubin: Path) -> dict[str, str]:
    """Mangled name -> machine code."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None, "the test needs the triton wheel"
    assert spec.origin is not None
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}  # it calls nvdisasm
    result = subprocess.run(
        [str(tools / "cuobjdump"), "-sass", str(cubin)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    parts = re.split(r"Function : (\S+)", result.stdout)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))
