"""The two models of QMF (Zhang et al., ICML 2023) in plain PyTorch: text and image, RGB and depth.

Every encoder of a pair returns class logits by itself, the cheaper one stands first, and they know
nothing of fusion. Weights and inputs are random. Each pair comes in the paper's size and shortened,
for a machine with two cores: fewer layers, or smaller images where there are few layers. The ratio
of text to image stays, between a fifth and a quarter at 32 tokens (2.74 to 11.51 billion
multiply-accumulates, shortened 0.46 to 2.12).

    pair = PAIRS["text-image"]
    encoders = pair.make_encoders(shortened=True)
    inputs = pair.make_inputs(16, shortened=True)
    logits = [encoder(*pair.reads(name, inputs)) for name, encoder in encoders.items()]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ceilings import Costs
from benchmarks.nyud import Bottleneck, ConvNorm, Residual
from dynmm_kernels import branch_costs

VOCABULARY = 30522
LONGEST = 512
TOKENS = 32


class TextEncoder(nn.Module):
    """ids int64 [n, T], mask bool [n, T] (False: padding) -> logits [n, classes]; like BERT-base.

    Segments, of which a single text has one, are left out.
    """

    def __init__(self, classes: int, layers: int, width: int = 768):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LONGEST, width)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(
            width, nhead=12, dim_feedforward=4 * width, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        embedded = self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]])
        return self.head(self.encoder(embedded, src_key_padding_mask=~mask)[:, 0])


class BasicBlock(Residual):
    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        body = nn.Sequential(
            ConvNorm(inputs, outputs, 3, stride), ConvNorm(outputs, outputs, 3, relu=False)
        )
        super().__init__(body, inputs, outputs, stride)


class ImageEncoder(nn.Module):
    """A ResNet: image [n, 3, H, W] -> logits [n, classes].

    Args:
        blocks: of each stage.
        grid: cells, by rows and columns, over which the last maps are averaged for the classifier.
    """

    def __init__(
        self,
        classes: int,
        block: Callable[..., nn.Module],
        widths: tuple[int, ...],
        blocks: tuple[int, ...],
        grid: tuple[int, int] = (1, 1),
    ):
        super().__init__()
        self.grid = grid
        layers, before = [ConvNorm(3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)], 64
        for k, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers.append(block(before, width, stride=1 if k == 0 else 2))
            layers += [block(width, width) for _ in range(count - 1)]
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before * grid[0] * grid[1], classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.body(image), self.grid).flatten(1))


RESNET_18 = (BasicBlock, (64, 128, 256, 512), (2, 2, 2, 2))
RESNET_23 = (Bottleneck, (256, 512, 1024, 2048), (1, 2, 3, 1))
RESNET_152 = (Bottleneck, (256, 512, 1024, 2048), (3, 8, 36, 3))


@dataclass(frozen=True)
class Pair:
    name: str
    parts: dict[str, tuple[str, ...]]
    """Encoder -> the inputs that it reads."""
    build: Callable[[bool], dict[str, nn.Module]]
    """shortened -> encoders, the cheaper one first."""
    make_inputs: Callable[..., dict[str, Tensor]]
    """(n, shortened, seed=0) -> inputs by name."""

    def make_encoders(self, shortened: bool, seed: int = 0) -> dict[str, nn.Module]:
        """On the CPU, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {name: encoder.eval() for name, encoder in self.build(shortened).items()}

    def reads(self, name: str, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The arguments of one encoder."""
        return tuple(inputs[part] for part in self.parts[name])


def text_and_image(shortened: bool) -> dict[str, nn.Module]:
    """Of UPMC Food-101. Two layers of twelve; 7 residual blocks of 50."""
    image = ImageEncoder(101, *(RESNET_23 if shortened else RESNET_152), grid=(3, 1))
    return {"text": TextEncoder(101, 2 if shortened else 12), "image": image}


def texts_and_images(
    n: int, shortened: bool, seed: int = 0, tokens: int = TOKENS
) -> dict[str, Tensor]:
    """Texts of tokens/2 to `tokens` tokens, padded; images of 224 pixels a side."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(tokens // 2, tokens + 1, (n, 1), generator=generator)
    ids = torch.randint(VOCABULARY, (n, tokens), generator=generator)
    image = torch.randn(n, 3, 224, 224, generator=generator)
    return {"ids": ids, "mask": torch.arange(tokens) < lengths, "image": image}


def rgb_and_depth(shortened: bool) -> dict[str, nn.Module]:
    """Of NYU Depth V2."""
    return {name: ImageEncoder(10, *RESNET_18) for name in ("rgb", "depth")}


def two_images(n: int, shortened: bool, seed: int = 0) -> dict[str, Tensor]:
    """Of 224 or 128 pixels a side."""
    generator = torch.Generator().manual_seed(seed)
    size = 128 if shortened else 224
    return {name: torch.randn(n, 3, size, size, generator=generator) for name in ("rgb", "depth")}


PAIRS = {
    "text-image": Pair(
        name="text-image",
        parts={"text": ("ids", "mask"), "image": ("image",)},
        build=text_and_image,
        make_inputs=texts_and_images,
    ),
    "rgb-d": Pair(
        name="rgb-d",
        parts={"rgb": ("rgb",), "depth": ("depth",)},
        build=rgb_and_depth,
        make_inputs=two_images,
    ),
}


@cache
def cascade_costs(name: str, shortened: bool) -> Costs:
    """Counted on the meta device for one sample.

    The first encoder, which all samples pass, counts as a gate, and who leaves after it pays for no
    branch.
    """
    pair = PAIRS[name]
    inputs = {part: x.to("meta") for part, x in pair.make_inputs(1, shortened).items()}
    first, second = (
        branch_costs(encoder.to("meta"), pair.reads(part, inputs))
        for part, encoder in pair.build(shortened).items()
    )
    return Costs(gate=first, branches=(0.0, second))
