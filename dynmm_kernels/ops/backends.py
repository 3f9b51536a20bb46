"""Which implementation serves: found once at import, chosen by device, or asked for by name.

`DYNMM_BACKEND=reference|cpu` or `with backend("reference")` is an explicit request: it is honoured
or refused, never replaced.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from . import reference, schemas
from .fingerprint import fingerprint

PACKAGE = Path(__file__).resolve().parents[1]
BACKENDS = ("reference", "cpu")


class Kernels(SimpleNamespace):
    """One callable per op."""

    route: Callable[..., Any]
    route_argmax: Callable[..., Any]
    gather_rows: Callable[..., Any]
    combine_rows: Callable[..., Any]
    row_dots: Callable[..., Any]


@dataclass(frozen=True)
class Compiled:
    """The compiled kernels, or why there are none."""

    folder: Path | None
    reason: str | None
    build_info: ModuleType | None


def _load() -> Compiled:
    """Loads the kernels that belong to this package.

    Run from a source checkout, the checkout shadows the installed package; the kernels are then
    taken from where the package was installed, if they were built from the same sources.
    """
    candidates = [PACKAGE, *(Path(entry) / PACKAGE.name for entry in sys.path)]
    reason = "no compiled library was found; reinstall with a C++ compiler: pip install ."
    for folder in dict.fromkeys(path.resolve() for path in candidates):
        note = folder / "build_failure.txt"
        if note.is_file():
            reason = f"the build failed: {note.read_text().strip()}"
        library = folder / "_C.abi3.so"
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
        return Compiled(folder, None, build_info)
    return Compiled(None, reason, None)


def _build_info(folder: Path) -> ModuleType:
    name = "_build_info"
    spec = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"no {name} for Python {sys.version.split()[0]} in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compiled = _load()
if compiled.reason:
    warnings.warn(
        f"dynmm_kernels runs on its PyTorch reference (correct, slower): {compiled.reason}",
        stacklevel=2,
    )

_reference = Kernels(**{op: getattr(reference, op) for op in schemas.OPS})
_overloads = {op: getattr(getattr(torch.ops, schemas.NAMESPACE), op).default for op in schemas.OPS}
_traceable = Kernels(**_overloads)
# Below the Python wrapper of each overload: the same dispatch, about a microsecond sooner.
_dispatched = Kernels(**{op: getattr(call, "_op", call) for op, call in _overloads.items()})


def why_not(name: str) -> str | None:
    """None where backend `name` can serve, else the reason."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, want one of {', '.join(map(repr, BACKENDS))}")
    return compiled.reason if name == "cpu" else None


def _requested(name: str) -> Kernels:
    reason = why_not(name)
    if reason:
        raise RuntimeError(
            f"backend {name!r} was requested, but it is not available: {reason}. "
            "Details: python -m dynmm_kernels info"
        )
    return _reference if name == "reference" else _dispatched


_environment = os.environ.get("DYNMM_BACKEND", "auto")
serving = _dispatched if _environment == "auto" else _requested(_environment)


def kernels() -> Kernels:
    """The ops of the backend that serves now, in a form that torch.compile can trace."""
    if serving is _dispatched and torch.compiler.is_compiling():
        return _traceable
    return serving


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block every op runs on backend `name` ("reference", "cpu"), in all threads.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend is not available here; the message says why.
    """
    global serving
    before, serving = serving, _requested(name)
    try:
        yield
    finally:
        serving = before
