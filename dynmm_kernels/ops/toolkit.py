"""Where the CUDA toolkit stands (also used by setup.py)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def find_toolkit(major: int | None = None) -> Path:
    """The folder with bin/nvcc and include/cuda_runtime.h, of CUDA `major` where that is given.

    The nvcc on PATH may be a wrapper that stands elsewhere, so each candidate must hold both.

    Raises:
        LookupError: there is none; the message says what was looked at.
    """
    seen = []
    for home in dict.fromkeys(_candidates()):
        nvcc = home / "bin" / "nvcc"
        if not (nvcc.is_file() and (home / "include" / "cuda_runtime.h").is_file()):
            continue
        version = nvcc_version(home)
        if major is None or version[0] == major:
            return home
        seen.append(f"{home} is CUDA {version[0]}.{version[1]}")
    wanted = "" if major is None else f" {major}"
    found = "; ".join(seen) or "CUDA_HOME, nvcc on PATH and /usr/local/cuda* hold none"
    raise LookupError(f"no CUDA{wanted} toolkit: {found}; set CUDA_HOME to one")


def nvcc_version(home: Path) -> tuple[int, int]:
    """(major, minor) of the compiler in toolkit `home`."""
    text = subprocess.run(
        [str(home / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _candidates() -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parents[1]
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
