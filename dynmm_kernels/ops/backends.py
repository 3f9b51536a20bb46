"""Which implementation serves: found once at import, chosen by device, or asked for by name.

By device: CPU tensors go to the C++ kernels; CUDA tensors to the CUDA C++ kernels, or to Triton
where those are not built; everything else, and what is missing, to the reference.
`DYNMM_BACKEND=<name>` or `with backend("<name>")` is an explicit request: it is honoured or
refused, never replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import reference, schemas
from .libraries import Compiled, load

BACKENDS = ("reference", "cpu", "cuda", "triton")

_log = logging.getLogger("dynmm_kernels")


class Kernels(SimpleNamespace):
    """One callable per op."""

    route: Callable[..., Any]
    route_argmax: Callable[..., Any]
    gather_rows: Callable[..., Any]
    combine_rows: Callable[..., Any]
    row_dots: Callable[..., Any]
    se_add: Callable[..., Any]
    se_add_means: Callable[..., Any]
    se_add_dots: Callable[..., Any]
    se_add_grads: Callable[..., Any]


def _load_cuda() -> Compiled:
    if torch.version.cuda is None:
        return Compiled(f"torch {torch.__version__} has no CUDA", None)
    return load("_C_cuda.abi3.so", "cuda_failure.txt")


compiled = load("_C.abi3.so", "build_failure.txt")
compiled_cuda = _load_cuda()
if compiled.reason:
    warnings.warn(
        f"dynmm_kernels runs on its PyTorch reference (correct, slower): {compiled.reason}",
        stacklevel=2,
    )


def _triton_kernel(op: str) -> Callable[..., Any]:
    """The Triton implementation of `op`; Triton is imported at the first call."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__package__}.triton"), op)(*arguments)

    return call


_triton = Kernels(**{op: _triton_kernel(op) for op in schemas.OPS})
_has_triton = importlib.util.find_spec("triton") is not None
if torch.version.cuda and compiled_cuda.reason and _has_triton:
    _log.info("CUDA tensors go to the Triton kernels: %s", compiled_cuda.reason)
    for _op in schemas.OPS:
        schemas.library.impl(_op, getattr(_triton, _op), "CUDA")

_reference = Kernels(**{op: getattr(reference, op) for op in schemas.OPS})
_overloads = {op: getattr(getattr(torch.ops, schemas.NAMESPACE), op).default for op in schemas.OPS}
_traceable = Kernels(**_overloads)
# Below the Python wrapper of each overload: the same dispatch, about a microsecond sooner.
_dispatched = Kernels(**{op: getattr(call, "_op", call) for op, call in _overloads.items()})


def _only_on(device: str) -> Kernels:
    """The dispatched ops, which refuse tensors of another device."""

    def guarded(op: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def on_device(first: Any, *others: Any) -> Any:
            tensor: Tensor = first if isinstance(first, Tensor) else first[0]
            if tensor.device.type != device:
                raise RuntimeError(
                    f"backend {device!r} was requested, but {op} got tensors on {tensor.device}"
                )
            return call(first, *others)

        return on_device

    return Kernels(**{op: guarded(op, call) for op, call in vars(_dispatched).items()})


_tables = {
    "reference": _reference,
    "cpu": _only_on("cpu"),
    "cuda": _only_on("cuda"),
    "triton": _triton,
}


def why_not(name: str) -> str | None:
    """None where backend `name` can serve, else the reason."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, want one of {', '.join(map(repr, BACKENDS))}")
    if name == "cpu":
        return compiled.reason
    if name == "cuda":
        return compiled_cuda.reason or _no_gpu("built and loaded, but ")
    if name == "triton":
        if not _has_triton:
            return "triton is not installed; pip install triton"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return _no_gpu() and f"{_no_gpu()}; TRITON_INTERPRET=1 runs it on the CPU, slowly"
    return None


def _no_gpu(prefix: str = "") -> str | None:
    return None if torch.cuda.is_available() else f"{prefix}torch sees no GPU"


def _requested(name: str) -> Kernels:
    reason = why_not(name)
    if reason:
        raise RuntimeError(
            f"backend {name!r} was requested, but it is not available: {reason}. "
            "Details: python -m dynmm_kernels info"
        )
    return _tables[name]


_environment = os.environ.get("DYNMM_BACKEND", "auto")
serving = _dispatched if _environment == "auto" else _requested(_environment)


def kernels() -> Kernels:
    """The ops of the backend that serves now, in a form that torch.compile can trace."""
    if serving is not _reference and serving is not _triton and torch.compiler.is_compiling():
        return _traceable
    return serving


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block every op runs on backend `name`, in all threads.

    Args:
        name: "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend is not available here (the message says why), or an op then gets
            tensors of another device.
    """
    global serving
    before, serving = serving, _requested(name)
    try:
        yield
    finally:
        serving = before
