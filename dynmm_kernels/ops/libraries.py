"""The compiled kernels: where they stand, whether they belong to this package, why not."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from .fingerprint import fingerprint

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Compiled:
    """A library of kernels, or the reason why there is none."""

    reason: str | None
    build_info: ModuleType | None


def load(library_name: str, note_name: str) -> Compiled:
    """Loads the library that belongs to this package; its kernels then override the reference.

    Run from a source checkout, the checkout shadows the installed package; the kernels are then
    taken from where the package was installed, if they were built from the same sources.
    """
    candidates = [PACKAGE, *(Path(entry) / PACKAGE.name for entry in sys.path)]
    reason = "no compiled library was found; reinstall with a C++ compiler: pip install ."
    for folder in dict.fromkeys(path.resolve() for path in candidates):
        note = folder / note_name
        if note.is_file():
            reason = f"the build failed: {note.read_text().strip()}"
        library = folder / library_name
        if not library.is_file():
            continue
        try:
            build_info = _build_info(folder)
            csrc = PACKAGE.parent / "csrc"
            if csrc.is_dir() and fingerprint(csrc) != build_info.sources:
                reason = (
                    f"{library} was built from other sources than {csrc}; reinstall: pip install ."
                )
                continue
            torch.ops.load_library(str(library))
        except (ImportError, OSError) as error:
            reason = f"{library} does not load: {error}"
            continue
        return Compiled(None, build_info)
    return Compiled(reason, None)


def _build_info(folder: Path) -> ModuleType:
    name = "_build_info"
    spec = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"no {name} for Python {sys.version.split()[0]} in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
