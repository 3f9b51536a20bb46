"""What may be called where a module is wanted, and arguments that are passed by keyword."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

Callee = nn.Module | Callable[..., Any]  # what may stand where a module is wanted


class Keywords(dict[str, Any]):
    """Keyword arguments, the last of a tuple of arguments."""


def _flatten(named: Keywords) -> tuple[list[Any], list[str]]:
    return [*named.values()], [*named]


def _unflatten(values: Any, names: Any) -> Keywords:
    return Keywords(zip(names, values, strict=True))


pytree.register_pytree_node(
    Keywords, _flatten, _unflatten, serialized_type_name=f"{__name__}.Keywords"
)


def joined(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Both kinds of arguments as one tuple."""
    return (*inputs, Keywords(named)) if named else inputs


def parted(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """What `joined` made one."""
    if arguments and type(arguments[-1]) is Keywords:
        return arguments[:-1], arguments[-1]
    return arguments, {}


class Function(nn.Module):
    """A function as a module. Where it is a method of one, that is a part of it.

    So its parameters, buffers and layers are seen; those that a function takes from elsewhere
    are not.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.given: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}
        while isinstance(function, functools.partial):
            self.given, self.named = (
                (*function.args, *self.given),
                {**function.keywords, **self.named},
            )
            function = function.func
        self.owner = getattr(function, "__self__", None)
        owned = isinstance(self.owner, nn.Module) and hasattr(function, "__func__")
        if not owned:
            self.owner = None
        self.function = function.__func__ if owned else function  # type: ignore[attr-defined]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        owner = () if self.owner is None else (self.owner,)
        return self.function(*owner, *self.given, *inputs, **{**self.named, **named})

    def extra_repr(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


def as_module(callee: Any, role: str) -> nn.Module:
    """A module as it is, any other callable as a `Function`.

    Raises:
        TypeError: it cannot be called, or is a class.
    """
    if isinstance(callee, nn.Module):
        return callee
    if isinstance(callee, type):
        raise TypeError(
            f"{role} must be a module or a function; got the class {callee.__name__}: give an "
            "instance of it"
        )
    if not callable(callee):
        raise TypeError(f"{role} must be a module or a function; got {type(callee).__name__}")
    return Function(callee)
