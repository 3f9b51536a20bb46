"""The fusion-level models of DynMM on NYU Depth V2: two encoders, fused stage by stage, a decoder.

After ESANet (Seichter et al., 2021), on which DynMM builds: "R50" has ResNet-50 encoders and
squeeze-and-excite addition, "R34" ResNet-34 with factorised blocks and plain addition. They know
nothing of routing; a :class:`Stack` of one of the two kinds does the fusing.

    rgb [n, 3, H, W], depth [n, 1, H, W] -> class logits [n, 40, H, W]
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 40
PATHS = 5  # depth is fused in the first 0..4 stages

# Shares of the paths 0..4. Only their mean costs are published; these two are fitted to them.
MIXES = {
    "b": (0.03, 0.05, 0.10, 0.42, 0.40),
    "a": (0.10, 0.25, 0.35, 0.20, 0.10),
    "uniform": (0.2, 0.2, 0.2, 0.2, 0.2),
    "all-0": (1.0, 0.0, 0.0, 0.0, 0.0),
    "all-4": (0.0, 0.0, 0.0, 0.0, 1.0),
}


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, unless told otherwise, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, relu: bool = True):
        conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *[nn.ReLU()] * relu)


class Residual(nn.Module):
    """relu(body(x) + shortcut(x))"""

    def __init__(self, body: nn.Module, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = body
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Bottleneck(Residual):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        width = outputs // 4
        body = nn.Sequential(
            ConvNorm(inputs, width, 1),
            ConvNorm(width, width, 3, stride),
            ConvNorm(width, outputs, 1, relu=False),
        )
        super().__init__(body, inputs, outputs, stride)


class NonBottleneck1D(Residual):
    """Two 3x3 convolutions, each factorised into 3x1 and 1x3."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        def pair(inputs: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, outputs, (3, 1), (stride, 1), padding=(1, 0)),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, (1, 3), (1, stride), padding=(0, 1)),
                nn.BatchNorm2d(outputs),
            ]

        body = nn.Sequential(*pair(inputs, stride), nn.ReLU(), *pair(outputs, 1))
        super().__init__(body, inputs, outputs, stride)


class LearnedUpsample(nn.Module):
    """Twice the size: nearest neighbour, then a depthwise 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PyramidPooling(nn.Module):
    """The map and its averages over grids of 1, 2, 3 and 6 cells a side, merged."""

    def __init__(self, inputs: int, outputs: int, grids: tuple[int, ...] = (1, 2, 3, 6)):
        super().__init__()
        width = inputs // len(grids)
        self.grids = grids
        self.reduce = nn.ModuleList(ConvNorm(inputs, width, 1) for _ in grids)
        self.merge = ConvNorm(inputs + width * len(grids), outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for grid, reduce in zip(self.grids, self.reduce, strict=True):
            pooled = reduce(F.adaptive_avg_pool2d(x, grid))
            parts.append(F.interpolate(pooled, x.shape[2:], mode="bilinear"))
        return self.merge(torch.cat(parts, 1))


class Decoder(nn.Module):
    """(last stage, skips of stages 1, 2 and 3) -> logits at 4 times the size of the first."""

    def __init__(self, encoder: list[int], widths: list[int]):
        super().__init__()
        self.context = PyramidPooling(encoder[3], widths[0])
        inputs = [widths[0], *widths[:2]]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                ConvNorm(before, width, 3),
                *(NonBottleneck1D(width, width) for _ in range(3)),
                LearnedUpsample(width),
            )
            for before, width in zip(inputs, widths, strict=True)
        )
        self.skips = nn.ModuleList(
            ConvNorm(channels, width, 1)
            for channels, width in zip(encoder[2::-1], widths, strict=True)
        )
        self.head = nn.Sequential(
            nn.Conv2d(widths[2], CLASSES, 3, padding=1),
            LearnedUpsample(CLASSES),
            LearnedUpsample(CLASSES),
        )

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.context(x)
        for block, project, skip in zip(self.blocks, self.skips, skips[::-1], strict=True):
            height, width = skip.shape[2:]  # an odd size was rounded up on its way down
            x = block(x)[:, :, :height, :width] + project(skip)
        return self.head(x)


class GlobalGate(nn.Module):
    """Maps of both stems, [n, 64, h, w] each -> logits [n, 5]."""

    def __init__(self, channels: int = 64, hidden: int = 8):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2 * channels, hidden, 5, 2),
            nn.BatchNorm2d(hidden),
            nn.Tanh(),
            nn.Conv2d(hidden, hidden, 5, 2),
            nn.BatchNorm2d(hidden),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(hidden, PATHS, 1, bias=False),
            nn.Flatten(),
        )

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return self.body(torch.cat([rgb, depth], 1))


class SqueezeExciteAdd(nn.Module):
    """se(rgb) + se(depth), written out: what a user has."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()

        def excitation() -> nn.Module:
            return nn.Sequential(
                nn.Linear(channels, channels // reduction),
                nn.ReLU(),
                nn.Linear(channels // reduction, channels),
                nn.Sigmoid(),
            )

        self.excite_main, self.excite_aux = excitation(), excitation()

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return self.excited(rgb, self.excite_main) + self.excited(depth, self.excite_aux)

    @staticmethod
    def excited(x: Tensor, excite: nn.Module) -> Tensor:
        return x * excite(x.mean((2, 3)))[:, :, None, None]


class PlainAdd(nn.Module):
    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return rgb + depth


class Encoder(nn.Module):
    """A stem and four stages."""

    def __init__(self, inputs: int, block: Callable[..., nn.Module], widths: list[int]):
        super().__init__()
        self.stem = ConvNorm(inputs, 64, 7, 2)
        stages, before = [], 64
        for k, (width, depth) in enumerate(zip(widths, (3, 4, 6, 3), strict=True)):
            first = block(before, width, stride=1 if k == 0 else 2)
            stages.append(nn.Sequential(first, *(block(width, width) for _ in range(depth - 1))))
            before = width
        self.stages = nn.ModuleList(stages)


class SegmentationNet(nn.Module):
    """Everything around the four fused stages.

    Args:
        kind: "R50" or "R34".
        fusion: channels -> a fusion module; default: that of the kind, in plain PyTorch.
    """

    def __init__(self, kind: str = "R50", fusion: Callable[[int], nn.Module] | None = None):
        super().__init__()
        bottleneck = kind == "R50"
        self.channels = [256, 512, 1024, 2048] if bottleneck else [64, 128, 256, 512]
        block = Bottleneck if bottleneck else NonBottleneck1D
        if fusion is None:
            fusion = SqueezeExciteAdd if bottleneck else lambda channels: PlainAdd()
        self.rgb = Encoder(3, block, self.channels)
        self.depth = Encoder(1, block, self.channels)
        self.fusions = nn.ModuleList(fusion(channels) for channels in [64, *self.channels])
        self.gate = GlobalGate()
        self.decoder = Decoder(self.channels, [128, 128, 128])

    def stems(self, rgb: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        """What the first stages read."""
        r, d = self.rgb.stem(rgb), self.depth.stem(depth)
        fused = self.fusions[0](r, d)
        return F.max_pool2d(fused, 3, 2, padding=1), F.max_pool2d(d, 3, 2, padding=1)

    def masked(self, main: Tensor, aux: Tensor, weights: Tensor) -> list[Tensor]:
        """The outputs of the four stages; every stage on every sample, as in DynMM's code.

        weights [n, 5], one-hot or soft: the path of each sample.
        """
        outputs = []
        for k in range(4):
            main, aux = self.rgb.stages[k](main), self.depth.stages[k](aux)
            skip = weights[:, : k + 1].sum(1).view(-1, 1, 1, 1)
            fuse = weights[:, k + 1 :].sum(1).view(-1, 1, 1, 1)
            main = skip * main + fuse * self.fusions[k + 1](main, aux)
            outputs.append(main)
        return outputs

    def decode(self, outputs: list[Tensor]) -> Tensor:
        return self.decoder(outputs[3], outputs[:3])
