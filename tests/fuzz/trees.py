"""Inputs of a fusion: nested packs of leaves, what a branch selects of them, and their rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynmm_kernels import Lazy, Shared

from .draw import LAYOUTS, Draw, laid_out


@dataclass(eq=False)
class Leaf:
    """One leaf of the inputs.

    Attributes:
        role: "rows", "integers", "bools", "lazy": one row per sample; "shared", "scalar",
            "number", "none": the same for all samples.
        value: what the fusion is given.
        tensor: the tensor behind it, where there is one.
    """

    role: str
    value: Any
    tensor: Tensor | None = None

    @property
    def has_rows(self) -> bool:
        return self.role in ("rows", "integers", "bools", "lazy")

    def row(self, sample: int) -> Any:
        """What a branch sees of one sample."""
        return self.rows(slice(sample, sample + 1))

    def rows(self, samples: slice | Tensor) -> Any:
        if self.has_rows:
            return self.tensor[samples]
        return self.value if self.tensor is None else self.tensor


def flat(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (list, tuple)):
        for part in tree:
            yield from flat(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from flat(part)
    else:
        yield tree


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(function, part) for part in tree)
    if isinstance(tree, dict):
        return {key: mapped(function, part) for key, part in tree.items()}
    return function(tree)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in flat(tree) if isinstance(leaf, Tensor)]


class Leaves:
    """Makes the leaves of one case."""

    def __init__(self, draw: Draw, num_rows: int, dtype: torch.dtype) -> None:
        self.draw, self.num_rows, self.dtype = draw, num_rows, dtype
        self.learn = draw.pick("inputs learn", {False: 1, True: 3})

    def rows(self, width: int, *, name: str, extra: tuple[int, ...] = ()) -> Leaf:
        values = self.draw.normal(self.num_rows, *extra, width).to(self.dtype)
        values = laid_out(values, self.draw.pick(f"layout of {name}", LAYOUTS))
        return Leaf("rows", *2 * (values.detach().requires_grad_(self.learn),))

    def vector(self) -> Leaf:
        values = self.draw.normal(self.num_rows).to(self.dtype).requires_grad_(self.learn)
        return Leaf("rows", values, values)

    def integers(self) -> Leaf:
        values = self.draw.integers(-3, 4, self.num_rows, 2)
        return Leaf("integers", values, values)

    def bools(self) -> Leaf:
        values = self.draw.integers(0, 2, self.num_rows, 3).bool()
        return Leaf("bools", values, values)

    def shared(self) -> Leaf:
        values = self.draw.normal(2, 3).to(self.dtype).requires_grad_(self.learn)
        return Leaf("shared", Shared(values), values)

    def lazy(self) -> Leaf:
        store = self.draw.normal(self.num_rows, 3).to(self.dtype)
        if self.draw.pick("fetch", ("rows", "the store itself")) == "rows":
            return Leaf("lazy", Lazy(lambda samples: store[samples]), store)

        def fetch(samples: Tensor) -> Tensor:
            return store if len(samples) == len(store) else store[samples]

        return Leaf("lazy", Lazy(fetch), store)

    def scalar(self) -> Leaf:
        value = self.draw.normal(1)[0].to(self.dtype).requires_grad_(self.learn)
        return Leaf("scalar", value, value)


def draw_inputs(leaves: Leaves) -> tuple[Any, ...]:
    """The arguments of the fusion, as trees of leaves; the first with rows is always "x"."""
    draw = leaves.draw
    x, y = leaves.rows(4, name="x"), leaves.rows(3, name="y", extra=(2,))
    others = [leaves.shared, leaves.lazy, leaves.scalar, leaves.vector, leaves.integers]
    extra = draw.pick(
        "extra input", ("none", "shared", "lazy", "scalar", "vector", "integers", "bools", "number")
    )
    made = {other.__name__: other for other in [*others, leaves.bools]}
    z = made[extra]() if extra in made else Leaf(extra, {"none": None, "number": 0.75}[extra])
    forms = {
        "one tensor": lambda: (x,),
        "two": lambda: (x, y),
        "three": lambda: (x, z, y),
        "list": lambda: ([x, y, z],),
        "tuple": lambda: ((x, z, y),),
        "dict": lambda: ({"a": x, "b": y, "c": z},),
        "packs": lambda: ([[x, z], y], leaves.vector()),
        "deep": lambda: ({"a": [x, {"z": z}], "b": (y, [])},),
        "twice": lambda: (x, x),
        "twice in a dict": lambda: ({"a": x, "b": [x, y]},),
    }
    return forms[draw.pick("inputs", tuple(forms))]()


def parts_of(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """What keys and positions name: entries of one dict, list or tuple, else the arguments."""
    only = arguments[0] if len(arguments) == 1 else None
    if isinstance(only, dict):
        return only
    return dict(enumerate(only if isinstance(only, (list, tuple)) else arguments))


def rows_leaf(arguments: tuple[Any, ...]) -> Any:
    return next(flat(arguments))


CALLABLES: dict[str, Callable[..., Any]] = {
    "callable, one": lambda *arguments: rows_leaf(arguments),
    "callable, the same twice": lambda *arguments: (rows_leaf(arguments),) * 2,
    "callable, a dict": lambda *arguments: dict.fromkeys("qkv", rows_leaf(arguments)),
    "callable, all as one": lambda *arguments: list(arguments),
}


def draw_selector(draw: Draw, name: str, arguments: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A selector for `Branch`, and what it selects of the arguments."""
    parts = parts_of(arguments)
    keys = list(parts)
    with_rows = [key for key in keys if isinstance(parts[key], Leaf) and parts[key].has_rows]
    chosen = draw.pick(
        f"inputs of {name}",
        (
            *("all", "one", "one, bare", "last", "all by name", "backwards", "repeated"),
            *("by keyword", *CALLABLES),
        ),
    )
    if chosen in CALLABLES:
        picked = CALLABLES[chosen](*arguments)
        return CALLABLES[chosen], picked if isinstance(picked, tuple) else (picked,)
    if chosen == "all":
        return None, arguments
    wanted = {
        "one": keys[:1],
        "one, bare": keys[:1],
        "last": with_rows[-1:] or keys[:1],
        "all by name": keys,
        "backwards": keys[::-1],
        "repeated": [keys[0], *keys[-1:], keys[0]],
        "by keyword": [*keys[-1:], keys[0]],
    }[chosen]
    if chosen == "by keyword":
        selector = {f"parameter {i}": key for i, key in enumerate(wanted)}
        return selector, tuple(parts[key] for key in wanted)
    return wanted[0] if chosen == "one, bare" else wanted, tuple(parts[key] for key in wanted)
