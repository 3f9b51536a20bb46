"""setup.py on stand-ins for the sources: what cannot be built leaves a note, and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynmm_kernels.ops.fingerprint import fingerprint, stamp, stamp_of
from dynmm_kernels.version import __version__

ROOT = Path(__file__).parents[2]
NOTE, CUDA_NOTE, LIBRARY = "build_failure.txt", "cuda_failure.txt", "_C.abi3.so"
NVCC = '#!/bin/sh\n[ "$1" = --version ] && echo "release 12.8, V12.8.0" && exit\nexit 1\n'
CXX = os.environ.get("CXX", "c++")
needs_compiler = pytest.mark.skipif(
    shutil.which(CXX) is None or subprocess.run([CXX, "--version"]).returncode != 0,
    reason="no C++ compiler that works",
)


@pytest.fixture
def project(tmp_path) -> Path:
    """The project with one small source per library."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests run without the project around them")
    root = tmp_path / "project"
    for name in ("setup.py", "pyproject.toml", "README.md", "csrc/build_info.cpp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    shutil.copy(ROOT / "csrc/stamp.cpp", root / "csrc")
    python = shutil.ignore_patterns("*.so", "*.txt", "__pycache__")
    shutil.copytree(ROOT / "dynmm_kernels", root / "dynmm_kernels", ignore=python)
    for name in ("csrc/cpu/kernel.cpp", "csrc/cuda/kernel.cu"):
        (root / name).parent.mkdir()
        (root / name).write_text("int kernel() { return 1; }\n")
    return root


def build(project: Path, before: str = "", to: str = "--build-lib=out", **environment: str) -> Path:
    """Where the package was built to; `before` runs first in the same process."""
    code = (
        f"import runpy, sys; {before}\n"
        f"sys.argv = ['setup.py', 'build_ext', '{to}', '--build-temp=temp']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return project / ("" if to == "--inplace" else "out") / "dynmm_kernels"


@needs_compiler
def test_a_failed_build_leaves_a_note_until_it_succeeds(project):
    package = build(project, CXX="/bin/false")
    assert (package / NOTE).read_text().strip()
    assert not (package / LIBRARY).exists()

    package = build(project)
    assert not (package / NOTE).exists()
    if torch.version.cuda is None:
        assert "has no CUDA" in (package / CUDA_NOTE).read_text()
    sources = fingerprint(project / "csrc")
    assert stamp_of(package / LIBRARY) == stamp(__version__, sources)
    assert (package / "sources.txt").read_text().strip() == sources


@needs_compiler
@pytest.mark.parametrize("to", ["--build-lib=out", "--inplace"])
def test_kernels_for_the_cpu_are_built_where_cuda_fails(project, tmp_path, to):
    """Torch says CUDA 12.8, and there is a toolkit whose compiler fails."""
    home = tmp_path / "cuda"
    for name, text in (("bin/nvcc", NVCC), ("include/cuda_runtime.h", "")):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(text)
    (home / "bin/nvcc").chmod(0o755)
    claimed = (
        "import torch.utils.cpp_extension as extension; extension.torch.version.cuda = '12.8';"
        f"extension.CUDA_HOME = {str(home)!r}"
    )
    package = build(project, claimed, to, CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST="9.0")
    assert (package / CUDA_NOTE).read_text().strip()
    assert "LookupError" not in (package / CUDA_NOTE).read_text()  # it was tried
    assert (package / LIBRARY).is_file()
    assert not (package / NOTE).exists()
