"""The names under which a model built around another one saves and loads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _Save:
    """Renames the entries of a state_dict: `names` by their names in the model, without prefix."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def __call__(self, _: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        values = [state.pop(prefix + own) for own in self.names]
        state |= {prefix + name: v for name, v in zip(self.names.values(), values, strict=True)}


class _Load(_Save):
    """Names them back."""

    def __call__(self, _: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        given = {name: state.pop(prefix + name, None) for name in {*self.names.values()}}
        for own, name in self.names.items():
            if given[name] is not None:
                state[prefix + own] = given[name]


def keep_keys(model: nn.Module, original: nn.Module) -> None:
    """Lets `model` save and load under the names of the model that it was built from.

    What `model` has in common with `original` (the same parameters and buffers, wherever they stand
    in it, as often as they do) appears in its state_dict once, under the name it has there, so
    that checkpoints of both are the same; what it does not share keeps its own name.

    Args:
        model: such as a module that holds `original` and a `NestedFusion` of its stages, or the
            fusion alone. Parameters must not be replaced afterwards.
        original: the model whose checkpoints are wanted. Of parts that `model` does not hold,
            checkpoints have more keys: load them with strict=False.

    Raises:
        ValueError: they share nothing, or a name of the original would meet another tensor.
    """
    theirs = {id(t): name for name, t in original.state_dict(keep_vars=True).items()}
    own = _tensors(model)
    names = {name: theirs[id(t)] for name, t in own.items() if id(t) in theirs}
    if not names:
        raise ValueError(
            f"keep_keys: {type(model).__name__} has no parameter or buffer of "
            f"{type(original).__name__}; build it from the modules of that, not from copies"
        )
    taken = {*names.values()} & ({*own} - {*names})
    if taken:
        raise ValueError(
            f"keep_keys: {type(model).__name__} has other tensors under names of "
            f"{type(original).__name__}: {', '.join(sorted(taken))}; rename the modules they are in"
        )
    model.register_state_dict_post_hook(_Save(names))
    model.register_load_state_dict_pre_hook(_Load(names))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
