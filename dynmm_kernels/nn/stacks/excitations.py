"""The two small networks of other people's squeeze-and-excite additions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RESHAPING = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Flatten, nn.Identity),
)


class Pointwise(nn.Module):
    """A convolution of size 1 as the linear map of channels that it is, with the same weights."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, means: Tensor) -> Tensor:
        own: Any = self.convolution
        return nn.functional.linear(means, own.weight.flatten(1), own.bias)


def find_excitations(module: nn.Module) -> list[nn.Sequential]:
    """Each network C -> h -> C inside `module`, [n, C] -> [n, C], on the same weights.

    It is looked for as the smallest part that holds two linear maps or convolutions of size 1; its
    layers are taken in the order in which they are registered.
    """
    found = []
    for part in _smallest_with_two(module):
        layers = [leaf for leaf in _leaves(part) if not isinstance(leaf, _RESHAPING)]
        found.append(nn.Sequential(*[Pointwise(x) if _is_map(x, True) else x for x in layers]))
    return found


def channels_of(excitation: nn.Sequential) -> int:
    """C, which it takes and returns."""
    last = [layer for layer in excitation if isinstance(layer, (Pointwise, nn.Linear))][-1]
    return len((last.convolution if isinstance(last, Pointwise) else last).weight)


def _smallest_with_two(module: nn.Module) -> Iterator[nn.Module]:
    if len(_maps(module)) < 2:
        return
    inner = [found for child in module.children() for found in _smallest_with_two(child)]
    if inner:
        yield from inner
    elif len(_maps(module)) == 2:
        yield module


def _maps(module: nn.Module) -> list[nn.Module]:
    return [leaf for leaf in _leaves(module) if _is_map(leaf) or _is_map(leaf, True)]


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if not [*part.children()]]


def _is_map(layer: nn.Module, convolution: bool = False) -> bool:
    if not convolution:
        return isinstance(layer, nn.Linear)
    return isinstance(layer, _CONVOLUTIONS) and {*layer.kernel_size} == {1} and layer.groups == 1


def difference(ours: nn.Module, theirs: nn.Module, channels: int) -> float:
    """The largest on two small maps in eval mode, relative to the largest value."""
    like = next(theirs.parameters())
    shape = (2, channels, 2, 3)
    main, aux = (torch.randn(shape, device=like.device, dtype=like.dtype) for _ in range(2))
    training = [part for part in theirs.modules() if part.training]
    theirs.eval()
    ours.eval()
    try:
        with torch.no_grad():
            wanted = theirs(main, aux)
            return float((ours(main, aux) - wanted).abs().max() / wanted.abs().max())
    finally:
        for part in training:
            part.training = True
