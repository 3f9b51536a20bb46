"""Named ranges in the traces of torch.profiler: which phase, which branch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, TypeVar

from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling

Called = TypeVar("Called", bound=Callable[..., Any])


class _Part(local):
    """What branches are called for, in this thread."""

    title: str | None = None  # of a gate
    rest = False  # the samples of others, without a graph


_part = _Part()


def recording() -> bool:
    """Whether a profiler runs."""
    return not is_dynamo_compiling() and profiler._is_profiler_enabled


def span(name: str) -> profiler.record_function:
    return profiler.record_function(f"dynmm_kernels::{name}")


def phase(name: str) -> Callable[[Called], Called]:
    """Calls of the function are ranges of that name."""

    def decorate(function: Called) -> Called:
        @functools.wraps(function)
        def wrapper(*args: Any, **named: Any) -> Any:
            if is_dynamo_compiling() or not profiler._is_profiler_enabled:
                return function(*args, **named)
            with span(name):
                return function(*args, **named)

        return wrapper  # type: ignore[return-value]

    return decorate


def own_or_rest(name: str) -> profiler.record_function:
    """The range of a module that is called on its own samples, or on those of others."""
    own = "" if _part.title else " own"
    return span((_part.title or name) + (" rest" if _part.rest else own))


@contextmanager
def asking(title: str) -> Iterator[None]:
    """What is called meanwhile is a gate."""
    before, _part.title = _part.title, title.removeprefix("the ")
    try:
        yield
    finally:
        _part.title = before


@contextmanager
def following() -> Iterator[None]:
    """What is called meanwhile runs on the samples of others."""
    if not recording():
        yield
        return
    before, _part.rest = _part.rest, True
    try:
        yield
    finally:
        _part.rest = before
