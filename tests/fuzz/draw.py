"""What a case is made of: every feature drawn by name, from a generator of its own.

So a feature can be forced to its plainest value without a change of the others, which is how a
failing case is made smaller.
"""

import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("plain", "transposed", "columns", "every second row", "offset", "one column", "one row")


class Draw:
    """The features and the tensors of one case.

    Args:
        seed: of the case; the same seed draws the same case.
        keep: names of the features that are drawn; the others take their plainest value, the
            first of their options. None: all are drawn.
    """

    def __init__(self, seed: int, keep: Sequence[str] | None = None) -> None:
        self.seed, self.keep = seed, keep
        self.features: dict[str, Hashable] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, name: str, options: Sequence[Any] | Mapping[Any, float]) -> Any:
        """One of the options, the plainest first; a mapping gives each its weight."""
        names = list(options)
        if self.keep is not None and name not in self.keep:
            value = names[0]
        else:
            weights = list(options.values()) if isinstance(options, Mapping) else None
            value = random.Random(f"{self.seed} {name}").choices(names, weights)[0]
        self.features[name] = value
        return value

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values in memory of another layout; "one column" and "one row" repeat them, too."""
    rows = len(values)
    beside = float("nan") if values.is_floating_point() or values.is_complex() else 1
    if layout == "transposed" and values.ndim > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "columns" and values.ndim > 1:
        wide = values.new_full((*values.shape[:-1], values.shape[-1] + 3), beside)
        wide[..., 1:-2] = values
        return wide[..., 1:-2]
    if layout == "every second row":
        tall = values.new_full((2 * rows, *values.shape[1:]), beside)
        tall[::2] = values
        return tall[::2]
    if layout == "offset":
        flat = values.new_empty(values.numel() + 1)
        flat[1:] = values.flatten()
        return flat[1:].view(values.shape)
    if layout == "one column" and values.ndim > 1 and values.shape[-1]:
        return values[..., :1].expand_as(values)
    if layout == "one row" and rows:
        return values[:1].expand_as(values)
    return values
