"""Small models to measure with: a gate, a cheap branch and a costly one, on random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.branch import Branch
from ..nn.routed.fusion import RoutedFusion


@dataclass(frozen=True)
class Workload:
    """One kind of model.

    Attributes:
        what: in a few words.
        build: makes the fusion; `inputs` the arguments of a call with so many samples.
        macs: multiply-accumulates per sample, of the gate, the cheap and the costly branch.
    """

    what: str
    build: Callable[[], RoutedFusion]
    inputs: Callable[[int], tuple[Tensor, ...]]
    macs: tuple[float, float, float]

    def make(self, rows: int, seed: int = 0) -> tuple[RoutedFusion, tuple[Tensor, ...]]:
        """The same model and samples for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(), self.inputs(rows)

    def ceiling(self, costly: int, rows: int, gate_grad: str | None) -> float:
        """Speed-up over masked if time went by multiply-accumulates; a backward costs two forwards.

        gate_grad: None in inference.
        """
        gate, cheap, dear = self.macs
        every = gate + cheap + dear
        share = costly / rows
        chosen = gate + cheap * (1 - share) + dear * share
        if gate_grad is None:
            return every / chosen
        forward = every if gate_grad == "straight_through" else chosen
        return 3 * every / (forward + 2 * chosen)


class Joined(nn.Module):
    """Modalities side by side into one network."""

    def __init__(self, network: nn.Module, dim: int = 1) -> None:
        super().__init__()
        self.network = network
        self.dim = dim

    def forward(self, *modalities: Tensor) -> Any:
        return self.network(torch.cat(modalities, self.dim))


class LastStep(nn.Module):
    """A sequence [n, T, features] through two Transformer layers; its last step to one number."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(features, width, bias=False)
        layers = [
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(2)
        ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1)

    def forward(self, steps: Tensor) -> Tensor:
        return self.head(self.layers(self.project(steps))[:, -1])


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convnet(width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def _trivial() -> RoutedFusion:
    branches = {"cheap": nn.Linear(16, 16), "costly": nn.Linear(16, 16)}
    return RoutedFusion(nn.Linear(16, 2), branches)


def _features() -> RoutedFusion:
    cheap = Branch(_mlp(300, 512, 512, 23), inputs=0)
    costly = Joined(_mlp(4396, 1024, 512, 23))
    return RoutedFusion(Joined(_mlp(4396, 128, 2)), {"cheap": cheap, "costly": costly})


def _sequences() -> RoutedFusion:
    gate = Branch(nn.Sequential(nn.Flatten(), nn.Linear(20 * 300, 2)), inputs=0)
    cheap = Branch(LastStep(300, 64), inputs=0)
    costly = Joined(LastStep(300 + 74 + 35, 128), dim=2)
    return RoutedFusion(gate, {"cheap": cheap, "costly": costly})


def _images() -> RoutedFusion:
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2))
    return RoutedFusion(gate, {"cheap": _convnet(8, 1), "costly": _convnet(32, 4)})


WORKLOADS = {
    "trivial": Workload(
        "linear layers of 16: the price of routing itself",
        _trivial,
        lambda n: (torch.randn(n, 16),),
        macs=(32, 256, 256),
    ),
    "features": Workload(
        "MLPs on text and image features, as on MM-IMDB",
        _features,
        lambda n: (torch.randn(n, 300), torch.randn(n, 4096)),
        macs=(562_944, 427_520, 5_037_568),
    ),
    "sequences": Workload(
        "small Transformers on text, audio and video, as on CMU-MOSEI",
        _sequences,
        lambda n: tuple(torch.randn(n, 20, width) for width in (300, 74, 35)),
        macs=(12_000, 2_452_544, 9_116_288),
    ),
    "images": Workload(
        "convolutions on images of 64 x 64",
        _images,
        lambda n: (torch.randn(n, 3, 64, 64),),
        macs=(96, 811_088, 38_633_792),
    ),
}
