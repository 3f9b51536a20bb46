"""The compiled kernels: where they stand, whether they belong to this package, why not.

Libraries are native code, so nothing is looked for along sys.path or in the current directory, and
nothing is loaded before its stamp was compared.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import site
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

from ..version import __version__
from .fingerprint import fingerprint, stamp, stamp_of

PACKAGE = Path(__file__).resolve().parents[1]

_log = logging.getLogger("dynmm_kernels")


@dataclass(frozen=True)
class Compiled:
    """A library of kernels, or the reason why there is none; and those that were refused."""

    reason: str | None
    build_info: ModuleType | None = None
    refused: tuple[str, ...] = ()


def load(library_name: str, note_name: str) -> Compiled:
    """Loads the library that belongs to this package; its kernels then override the reference.

    It stands beside the package. A source checkout shadows the package that was installed from it:
    then it may also stand there.
    """
    refused = []
    why_none = "no compiled library was found; reinstall with a C++ compiler: pip install ."
    for folder in _folders():
        note, library = folder / note_name, folder / library_name
        if note.is_file():
            why_none = f"the build failed: {note.read_text(errors='replace').strip()}"
        if not library.is_file():
            continue
        try:
            build_info = _load(library)
        except Exception as error:  # whatever a broken library does, the package can be imported
            refused.append(str(error))
            _log.info("%s", error)
        else:
            return Compiled(None, build_info, tuple(refused))
    return Compiled("; ".join(refused) or why_none, None, tuple(refused))


def _folders() -> Iterator[Path]:
    """Of this package, and where it runs from its sources, of the installed one."""
    yield PACKAGE
    if not _carried().is_file():
        users = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
        paths = [*site.getsitepackages(), *users]
        for distribution in metadata.distributions(name=PACKAGE.name, path=paths):
            yield Path(str(distribution.locate_file(PACKAGE.name)))


def _carried() -> Path:
    """The fingerprint of its sources, in a package that was installed without them."""
    return PACKAGE / "sources.txt"


def _sources() -> str:
    carried = _carried()
    if carried.is_file():
        return carried.read_text(errors="replace").strip()
    return fingerprint(PACKAGE.parent / "csrc")


def _load(library: Path) -> ModuleType:
    """
    Raises:
        ImportError: it is not of this package, or cannot be loaded.
    """
    _compare(library)
    build_info = _build_info(library.parent)
    try:
        torch.ops.load_library(str(library))
    except Exception as error:
        raise ImportError(f"{library} does not load: {error}") from error
    return build_info


def _compare(library: Path) -> None:
    wanted, got = stamp(__version__, _sources()), stamp_of(library)
    if got != wanted:
        built = f"was built as {got}" if got else "is no library of this package"
        raise ImportError(f"{library} {built}, wanted {wanted}; reinstall: pip install .")


def _build_info(folder: Path) -> ModuleType:
    """The module that says how the libraries were built."""
    name = "_build_info"
    spec = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    if spec is None or spec.loader is None or spec.origin is None:
        raise ImportError(f"{folder} holds no {name} for Python {sys.version.split()[0]}")
    _compare(Path(spec.origin))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
