"""Layers that samples skip or leave, in an encoder of the size of ViT-Ti.

python -m benchmarks.layers

As in ADMN (which layers run), and in networks with exits (how many). Decisions are planned, so that
shares are exact; every row is compared with the masked formula before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from benchmarks.reference import relative_error
from dynmm_kernels import Branch, EarlyExit, RoutedFusion, SkipLayer
from dynmm_kernels.measure.timing import FULL, Effort, interleave

KEPT = 0.47  # of all blocks, as in ADMN's smallest budget
DEPTHS = {"all run through": [1, 1], "all leave halfway": [0.5, 0.5], "at each quarter": [0.25, 1]}
TOLERANCE = 1e-4

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    rows: int = 8
    layers: int = 12
    tokens: int = 197
    width: int = 192


def encoder(size: Size) -> list[nn.Module]:
    return [
        nn.TransformerEncoderLayer(
            size.width,
            3,
            4 * size.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        for _ in range(size.layers)
    ]


class Planned(nn.Module):
    """A gate that learns, and says what it was told."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def planned(size: Size) -> Tensor:
    """bool [L, N]: which blocks run."""
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(size.layers * size.rows, generator=generator).argsort().argsort()
    return (order < round(KEPT * len(order))).view(size.layers, size.rows)


def weigh(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.view(-1, *[1] * (rows.ndim - 1)) * rows


def through(hard: Tensor, soft: Tensor) -> Tensor:
    return hard.to(soft.dtype) - soft.detach() + soft


def skipping(size: Size, learns: bool) -> dict[str, Run]:
    """By name; `learns`: the decision has a gradient."""
    blocks, keep = encoder(size), planned(size)
    score = nn.Parameter(torch.zeros(size.layers, size.rows))

    def weights() -> Tensor:
        return through(keep, score.sigmoid()) if learns else keep.float()

    def original(x: Tensor) -> Tensor:
        for block, w in zip(blocks, weights(), strict=True):
            x = weigh(w, block(x)) + weigh(1 - w, x)
        return x

    def by_hand(x: Tensor) -> Tensor:
        for block, row in zip(blocks, keep, strict=True):
            index = row.nonzero()[:, 0]
            if len(index):
                x = x.index_copy(0, index, block(x.index_select(0, index)))
        return x

    def skip_layers(gate_grad: str) -> Run:
        layers = [SkipLayer(block, execution="routed", gate_grad=gate_grad) for block in blocks]

        def run(x: Tensor) -> Tensor:
            for layer, w in zip(layers, weights() if learns else keep, strict=True):
                x = layer(x, keep=w)
            return x

        return run

    first = Branch(nn.Identity(), inputs=[0])
    gate = Branch(nn.Identity(), inputs=[1])
    fusions = [
        RoutedFusion(
            gate, [first, Branch(b, inputs=[0])], execution="routed", gate_returns="weights"
        )
        for b in blocks
    ]

    def fused(x: Tensor) -> Tensor:
        for fusion, w, row in zip(fusions, weights(), keep, strict=True):
            both = torch.stack([1 - w, w], 1)
            x = fusion(x, both, choice=None if learns else row.long())
        return x

    ways = {"original": original, "SkipLayer": skip_layers("straight_through")}
    if learns:
        return {**ways, "SkipLayer, selected": skip_layers("selected"), "RoutedFusion": fused}
    return {**ways, "index_copy by hand": by_hand, "RoutedFusion": fused}


def leaving(size: Size, depths: Tensor, learns: bool) -> dict[str, Run]:
    blocks, count = encoder(size), 1 + size.layers
    gate = Planned(4.0 * one_hot(depths, count))

    def original(x: Tensor) -> Tensor:
        """All layers and the weighted sum; without a gradient the weights only choose."""
        streams = [x]
        for block in blocks:
            streams.append(block(streams[-1]))
        if not learns:
            return torch.stack(streams)[depths, torch.arange(size.rows)]
        weights = through(one_hot(depths, count), gate(x).softmax(1)).unbind(1)
        return sum(map(weigh, weights, streams), torch.zeros(()))

    def by_hand(x: Tensor) -> Tensor:
        left, rows, alive = [], [], torch.arange(size.rows)
        for depth, block in enumerate(blocks):
            stays = depths[alive] > depth
            left.append(x[~stays])
            rows.append(alive[~stays])
            x, alive = x[stays], alive[stays]
            if not len(alive):
                break
            x = block(x)
        left.append(x)
        rows.append(alive)
        return torch.cat(left)[torch.cat(rows).argsort()]

    def exits(gate_grad: str) -> Run:
        module = EarlyExit(gate, blocks, execution="routed", gate_grad=gate_grad)
        return module if learns else lambda x: module(x, depth=depths)

    ways = {"original": original, "EarlyExit": exits("straight_through")}
    if learns:
        return {**ways, "EarlyExit, selected": exits("selected")}
    return {**ways, "by hand": by_hand}


def depths_of(size: Size, shares: Sequence[float]) -> Tensor:
    """From the first to the last share of the layers, in even steps."""
    return (torch.linspace(*shares, size.rows) * size.layers).round().long()


def compare(ways: dict[str, Run], size: Size, training: bool, effort: Effort) -> dict[str, float]:
    """Median milliseconds by name."""
    x = torch.randn(size.rows, size.tokens, size.width, generator=torch.Generator().manual_seed(0))

    def call(way: Run) -> Callable[[], object]:
        def step() -> None:
            way(x.clone().requires_grad_()).square().mean().backward()

        def infer() -> None:
            with torch.no_grad():
                way(x)

        return step if training else infer

    with torch.no_grad():
        right = ways["original"](x)
        for name, way in ways.items():
            error = relative_error(way(x), right)
            if not error <= TOLERANCE:
                raise AssertionError(f"{name} is off by {error}")
    seconds = interleave({name: call(way) for name, way in ways.items()}, effort)
    return {name: 1e3 * median(times) for name, times in seconds.items()}


def report(size: Size, effort: Effort) -> None:
    for training in (False, True):
        what = "training step" if training else "inference"
        show(f"{KEPT:.0%} of blocks kept, {what}", skipping(size, training), size, training, effort)
        for name, shares in DEPTHS.items():
            ways = leaving(size, depths_of(size, shares), training)
            show(f"{name}, {what}", ways, size, training, effort)


def show(title: str, ways: dict[str, Run], size: Size, training: bool, effort: Effort) -> None:
    print(title)
    medians = compare(ways, size, training, effort)
    for name, time in medians.items():
        print(f"  {name:20} {time:8.1f} ms {medians['original'] / time:6.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=FULL.seconds, help="for each comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report(Size(), Effort(seconds=options.seconds, rounds=(5, 100)))


if __name__ == "__main__":
    main()
