"""Which implementation serves: found once at import, chosen by device, or asked for by name.

By device: CPU tensors go to the C++ kernels; CUDA tensors to the CUDA C++ kernels, or to Triton
where those are not built; everything else, and what is missing, to the reference.
`DYNMM_BACKEND=<name>` or `with backend("<name>")` is an explicit request: it is honoured or
refused, never replaced. A request holds for its thread; autograd differentiates on threads of its
own, so a backward pass takes the kernels that its forward pass got from `kernels()`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import reference, schemas
from .libraries import Compiled, load

BACKENDS = ("reference", "cpu", "cuda", "triton")

_log = logging.getLogger("dynmm_kernels")


class Kernels:
    """One callable per op, and `traced`, the same in a form that torch.compile can trace."""

    def __init__(self, calls: dict[str, Callable[..., Any]], traced: Kernels | None = None) -> None:
        self.__dict__.update(calls)
        self.traced = traced or self

    if TYPE_CHECKING:

        def __getattr__(self, op: str) -> Callable[..., Any]: ...


def _load_cuda() -> Compiled:
    if torch.version.cuda is None:
        return Compiled(f"torch {torch.__version__} has no CUDA")
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

    def call(*arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(f"{__package__}.triton"), op)(*arguments, **named)

    return call


_triton = {op: _triton_kernel(op) for op in schemas.OPS}
_has_triton = importlib.util.find_spec("triton") is not None
if torch.version.cuda and compiled_cuda.reason and _has_triton:
    _log.info("CUDA tensors go to the Triton kernels: %s", compiled_cuda.reason)
    for _op, _call in _triton.items():
        for _name in schemas.overloads_of(schemas.OPS[_op].schema):
            schemas.library.impl(_name, _call, "CUDA")

_packets = {op: getattr(getattr(torch.ops, schemas.NAMESPACE), op) for op in schemas.OPS}
_overloads = {op: getattr(packet, packet.overloads()[-1]) for op, packet in _packets.items()}
# Below the Python wrapper of each default: the same dispatch, about a microsecond sooner.
_dispatched = {op: getattr(packet.default, "_op", packet) for op, packet in _packets.items()}


def _guarded(
    backend: str, serves: Callable[[str], bool], calls: dict[str, Callable[..., Any]]
) -> dict[str, Callable[..., Any]]:
    """`calls`, which then refuse tensors on devices that `backend` does not serve."""

    def guarded(op: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def on_device(*arguments: Any, **named: Any) -> Any:
            for argument in (*arguments, *named.values()):
                for tensor in argument if isinstance(argument, list | tuple) else (argument,):
                    if isinstance(tensor, Tensor) and not serves(tensor.device.type):
                        raise RuntimeError(
                            f"backend {backend!r} was requested, but {op} got a tensor on "
                            f"{tensor.device}"
                        )
            return call(*arguments, **named)

        return on_device

    return {op: guarded(op, call) for op, call in calls.items()}


def _compiled_on(device: str) -> Kernels:
    calls, traced = (
        _guarded(device, lambda of: of == device, calls) for calls in (_dispatched, _overloads)
    )
    return Kernels(calls, Kernels(traced))


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


_tables = {
    "reference": Kernels({op: getattr(reference, op) for op in schemas.OPS}),
    "cpu": _compiled_on("cpu"),
    "cuda": _compiled_on("cuda"),
    "triton": Kernels(
        _guarded("triton", lambda of: of == "cuda" or (of == "cpu" and _interpreted()), _triton)
    ),
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
        if _interpreted():
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


def _unless_requested() -> Kernels:
    name = os.environ.get("DYNMM_BACKEND") or "auto"
    return Kernels(_dispatched, Kernels(_overloads)) if name == "auto" else _requested(name)


class _Thread(threading.local):
    """What serves in a thread. torch.compile guards attributes of its own, no inherited ones."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels


_thread = _Thread(_unless_requested())


def kernels() -> Kernels:
    """The ops of the backend that serves this thread now, traceable by torch.compile."""
    return _thread.kernels.traced if is_dynamo_compiling() else _thread.kernels


def serving() -> Kernels:
    """As `kernels`, but torch.compile leaves its graph for the ops of compiled kernels.

    For calls whose numbers change with every batch: a graph would hold for one batch.
    """
    return _thread.kernels


class using:
    """Within the block the given `kernels` serve this thread."""

    __slots__ = ("before", "kernels")

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def __enter__(self) -> None:
        self.before, _thread.kernels = _thread.kernels, self.kernels

    def __exit__(self, *error: object) -> None:
        _thread.kernels = self.before


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block every op of this thread runs on backend `name`.

    As with torch.no_grad, threads that are started within the block do not inherit it.

    Args:
        name: "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend is not available here (the message says why), or an op then gets
            tensors of another device.
    """
    with using(_requested(name)):
        yield
