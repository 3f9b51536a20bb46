"""Tells whether compiled kernels belong to the package beside them (also used by setup.py)."""

import hashlib
import re
from pathlib import Path


def fingerprint(csrc: Path) -> str:
    """Hash of every source file under `csrc`, independent of where the folder stands."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            digest.update(path.relative_to(csrc).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def stamp(version: str, sources: str) -> str:
    """What every library carries in its bytes; `sources` is their fingerprint."""
    return f"dynmm_kernels {version} of sources {sources}"


def stamp_of(library: Path) -> str | None:
    """The stamp of a library, read without loading it; None: it has none."""
    found = re.search(rb"dynmm_kernels [\w.+-]+ of sources [0-9a-f]{16}", library.read_bytes())
    return found[0].decode() if found else None
