"""Ways to fuse two streams of features, for the stages of `NestedFusion` and `ChainedFusion`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...functional import maps
from .excitations import channels_of, difference, find_excitations


class Add(nn.Module):
    """main + aux: tensors of one shape."""

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return main + aux


class WeightedSum(nn.Module):
    """w_0 * main + w_1 * aux with two learned weights, of tensors of one shape.

    Args:
        weights: what they start from.
    """

    def __init__(self, weights: tuple[float, float] = (0.5, 0.5)) -> None:
        super().__init__()
        own, other = weights
        self.weights = nn.Parameter(torch.tensor([float(own), float(other)]))

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        own, other = self.weights.to(main.dtype)
        return own * main + other * aux


class Concat(nn.Module):
    """Both side by side, mapped linearly back to the channels of the main stream.

    main [n, channels, ...] and aux [n, aux_channels, ...] -> [n, channels, ...]; for maps that is
    a convolution of size 1, applied pixel by pixel.

    Args:
        channels: of the main stream.
        aux_channels: of the auxiliary one; default: the same.
    """

    def __init__(self, channels: int, aux_channels: int | None = None) -> None:
        super().__init__()
        both = channels + (channels if aux_channels is None else aux_channels)
        self.project = nn.Conv1d(both, channels, kernel_size=1)

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        both = torch.cat([main, aux], 1)
        if both.ndim == 4:  # so that channels last stays
            weight = self.project.weight.unsqueeze(3)
            return nn.functional.conv2d(both, weight, self.project.bias)
        pixels = both.flatten(2) if both.ndim > 2 else both.unsqueeze(2)
        return self.project(pixels).reshape(main.shape)


class SEAdd(nn.Module):
    """Squeeze-and-excite addition, the fusion of ESANet and of the fusion-level DynMM.

    out = s * main + t * aux, with s = sigmoid(W2 relu(W1 mean(main))) per sample and channel, t
    likewise from aux with weights of its own. Forward and backward are two passes over the maps
    each. aux may have fewer samples than main: its n samples belong to the first n of main, the
    others of main are returned as they are, so that a stack fuses its active prefix in place of
    splitting and joining the batch.

    Args:
        channels: C of both streams, [N, C, ...].
        reduction: W1 maps C to max(1, C // reduction) features.
    """

    fuses_prefix = True

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.channels = channels
        self.excite_main = _excitation(channels, reduction)
        self.excite_aux = _excitation(channels, reduction)

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        if isinstance(main, Tensor) and main.ndim > 1 and main.shape[1] != self.channels:
            raise ValueError(f"SEAdd: wanted [N, {self.channels}, ...]; got {list(main.shape)}")
        return maps.se_add(main, aux, self.excite_main, self.excite_aux, [*self.parameters()])

    @classmethod
    def from_(cls, module: nn.Module) -> SEAdd:
        """The same as `module`, on the same parameters.

        Args:
            module: a squeeze-and-excite addition of two maps [N, C, H, W], module(main, aux), such
                as that of ESANet and DynMM: two networks C -> h -> C of linear layers or
                convolutions of size 1, each the smallest part of `module` that holds two of them.

        Raises:
            ValueError: no two such networks in it, or it computes something else.
        """
        found = find_excitations(module)
        if len(found) != 2 or len({*map(channels_of, found)}) != 1:
            raise ValueError(
                "SEAdd.from_: wanted two networks C -> h -> C of linear layers or convolutions of "
                f"size 1 in {type(module).__name__}, for the same C; found {len(found)} that take "
                f"C = {[*map(channels_of, found)]}"
            )
        own = cls.__new__(cls)
        nn.Module.__init__(own)
        own.channels = channels_of(found[0])
        tolerance = torch.finfo(next(module.parameters()).dtype).eps ** 0.75
        for first, second in (found, found[::-1]):
            own.excite_main, own.excite_aux = first, second
            if difference(own, module, own.channels) <= tolerance:
                return own.train(module.training)
        raise ValueError(
            f"SEAdd.from_: {type(module).__name__} computes something else than s * main + t * aux "
            "with s and t from the means of main and aux by the layers in it, in their order"
        )


def _excitation(channels: int, reduction: int) -> nn.Sequential:
    hidden = max(1, channels // reduction)
    return nn.Sequential(
        nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
    )
