"""What may be called where a module is wanted, and arguments that are passed by keyword."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
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
    are not. A model that holds a fusion of its own methods is no part of these: what walks down
    from it would come back to it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.looking = False
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

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Itself, its parts, and those of a model that holds it."""
        self._part_from_holder()
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        holder = self.__dict__.get("owner")
        if holder is not None and remove_duplicate:
            yield from holder.named_modules(memo, f"{prefix}.owner")

    def train(self, mode: bool = True) -> Function:
        self._part_from_holder()
        return super().train(mode)

    def apply(self, function: Callable[[nn.Module], None]) -> Function:
        self._part_from_holder()
        return super().apply(function)

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        self._part_from_holder()
        return super().state_dict(*arguments, **options)

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._part_from_holder()
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._part_from_holder()
        super()._load_from_state_dict(*arguments)

    def __repr__(self) -> str:
        self._part_from_holder()
        return super().__repr__()

    def _part_from_holder(self) -> None:
        """Makes the owner a plain attribute as soon as this is a part of it."""
        owner = self._modules.get("owner")
        if owner is None or self.looking:
            return
        self.looking = True
        held = any(part is self for part in owner.modules())
        self.looking = False
        if held:
            del self._modules["owner"]
            self.__dict__["owner"] = owner

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
