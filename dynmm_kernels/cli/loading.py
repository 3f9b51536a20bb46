"""A user's model: its factory by name, the fusion in it, and what that is called with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..measure.work import batch_of
from ..nn.adaptive import Adaptive
from ..nn.calling import joined
from ..nn.routed.fusion import RoutedFusion
from .options import Mistake

OPTIONS: dict[str, Any] = {"batch": int, "shares": (list, tuple), "fusion": str}
OF_THE_CALL = ("choice", "return_routing", "generator")  # what a fusion does not pass on


class Made(NamedTuple):
    """What a factory returned."""

    model: nn.Module
    inputs: tuple[Any, ...]
    options: Mapping[str, Any]


def make(place: str) -> Made:
    """Calls the factory at ``module:factory`` or ``path/to/file.py:factory``.

    Raises:
        Mistake: there is none, or it returns something else than a model and its inputs.
    """
    module, _, name = place.rpartition(":")
    if not (module and name):
        raise Mistake(f"wanted MODULE:FACTORY or FILE.py:FACTORY; got {place!r}")
    factory = getattr(_import(module), name, None)
    if factory is None:
        raise Mistake(f"{module} has no {name!r}; wanted a callable that returns (model, inputs)")
    if not callable(factory):
        raise Mistake(f"{place} is no callable; got {type(factory).__name__}")
    made = factory()
    if not (isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
        raise Mistake(
            f"{place} must return (model, inputs) or (model, inputs, options), the model an "
            f"nn.Module; got {_describe(made)}"
        )
    model, inputs, options = made if len(made) == 3 else (*made, {})
    _check_options(place, options)
    return Made(model, inputs if isinstance(inputs, tuple) else (inputs,), options)


def _import(name: str) -> ModuleType:
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise Mistake(f"there is no file {name}")
        sys.path.insert(0, str(path.parent))
        spec = spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, str(Path.cwd()))
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise Mistake(f"no module {error.name!r} here or in the environment") from None


def _check_options(place: str, options: Any) -> None:
    known = isinstance(options, Mapping) and all(
        key in OPTIONS and isinstance(value, OPTIONS[key]) for key, value in options.items()
    )
    if not known:
        raise Mistake(
            f"the options of {place} may be batch (an int), shares (a list) and fusion (a name); "
            f"got {options!r}"
        )


def _describe(made: Any) -> str:
    if not isinstance(made, tuple):
        return type(made).__name__
    return f"({', '.join(type(part).__name__ for part in made)})"


def find_fusion(model: nn.Module, wanted: str | None) -> tuple[str, RoutedFusion]:
    """The fusion in the model, and its name there.

    Raises:
        Mistake: there is none, or several and none `wanted`, or one that cannot be measured.
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, Adaptive)}
    names = ", ".join(f"{name or '(the model)'} ({type(found[name]).__name__})" for name in found)
    if not found:
        raise Mistake(f"there is no RoutedFusion in the model, a {type(model).__name__}")
    if wanted is not None:
        if wanted not in found:
            raise Mistake(f"the model has no fusion {wanted!r}; it has {names}")
        name = wanted
    elif "" in found:
        name = ""
    elif len(found) > 1:
        raise Mistake(f"the model has several fusions; choose with --fusion NAME: {names}")
    else:
        (name,) = found
    fusion = found[name]
    if not isinstance(fusion, RoutedFusion):
        raise Mistake(
            f"{name or 'the model'} is a {type(fusion).__name__}; only a RoutedFusion is taken "
            "apart. Of any fusion, calibrate(*inputs) and then explain(*inputs) say which way is "
            "faster here"
        )
    if fusion.gate is None:
        raise Mistake(f"{name or 'the model'} has no gate; what a gate decides is measured")
    return name, fusion


def fusion_inputs(
    model: nn.Module, inputs: tuple[Any, ...], batch: int | None, name: str, fusion: nn.Module
) -> tuple[Any, ...]:
    """What the fusion is called with when the model is, with `batch` samples.

    Raises:
        Mistake: it is not called, or in a way that is not measured.
    """
    try:
        given = batch_of(inputs, batch).selected
    except (TypeError, ValueError) as error:
        raise Mistake(str(error)) from None
    if fusion is model:
        return given
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((arguments, named))

    watched = fusion.register_forward_pre_hook(keep, with_kwargs=True)
    before = {part: part.training for part in model.modules()}
    try:
        with torch.enable_grad():
            model.eval()(*given)
    finally:
        watched.remove()
        for part, training in before.items():
            part.training = training
    if not calls:
        raise Mistake(f"the model does not call its fusion {name!r} with these inputs")
    arguments, named = calls[0]
    if named.get("choice") is not None:
        raise Mistake(f"the model calls {name!r} with a choice; what its gate decides is measured")
    return joined(arguments, {key: x for key, x in named.items() if key not in OF_THE_CALL})
