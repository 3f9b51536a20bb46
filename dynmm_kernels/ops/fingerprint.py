"""Tells whether compiled kernels belong to the sources beside them (also used by setup.py)."""

import hashlib
from pathlib import Path


def fingerprint(csrc: Path) -> str:
    """Hash of every source file under `csrc`, independent of where the folder stands."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            digest.update(path.relative_to(csrc).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
