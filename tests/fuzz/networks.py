"""Branches and gates that read any tree and return any structure, one row per sample."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .draw import Draw
from .trees import Leaf, flat

FEATURES = 4


class Marked(Tensor):
    """A subclass without behaviour of its own."""


def counted(h: Tensor) -> Tensor:
    return (h.detach() * 8).round().long()


STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda h: h,
    "map": lambda h: h.view(-1, 2, 2),
    "transposed map": lambda h: h.view(-1, 2, 2).transpose(1, 2),
    "vector": lambda h: h[:, 0],
    "expanded": lambda h: h[:, :1].expand(-1, 3),
    "empty rows": lambda h: h[:, :0],
    "tuple": lambda h: (h[:, :2], h[:, 2:].exp()),
    "list": lambda h: [h.sin()],
    "dict": lambda h: {"a": h, "b": h.square()},
    "nested": lambda h: {"a": [h, (h[:, 0], None)], "b": 2.5},
    "with none": lambda h: (h, None),
    "with number": lambda h: (h, 3),
    "with integers": lambda h: (h, counted(h)),
    "with bools": lambda h: {"a": h, "b": h.detach() > 0},
    "with complex": lambda h: (h, torch.complex(h, 2 * h)),
    "complex": lambda h: torch.complex(h, h.square()),
    "integers": counted,
    "bools": lambda h: h.detach() > 0,
    "parameter": lambda h: nn.Parameter(h.detach().clone()),
    "subclass": lambda h: h.as_subclass(Marked),
    "twice": lambda h: (h, h),
    "with loss": lambda h: {"a": h, "loss": h.square().sum()},
    "losses": lambda h: (h.exp().sum(), [h[:, :2], h.sum()]),
}
FAULTS: dict[str, Callable[[Any], Any]] = {
    "none": lambda output: output,
    "a row less": lambda output: output[:-1],
    "no rows": lambda output: output.sum(),
    "wider": lambda output: torch.cat([output, output], -1),
    "another structure": lambda output: {"other": output},
    "on another device": lambda output: output.to("meta"),
    "no tensor": lambda output: "text",
}
OF_WIDTHS = ("tensor", "expanded", "empty rows", "subclass")  # one tensor, of their own width
FLAT = ("vector", "nested")  # with vectors, which have nothing to be concatenated along
LOSSES = ("with loss", "losses")
NO_HALF = (*LOSSES, "with complex", "complex", "with integers", "with bools", "integers", "bools")


class Network(nn.Module):
    """Maps what it reads to features, and the features to a structure.

    Args:
        reads: the leaves it will read, in order.
        structure: the name of one of `STRUCTURES`.
    """

    def __init__(
        self,
        draw: Draw,
        reads: Any,
        dtype: torch.dtype,
        structure: str = "tensor",
        features: int = FEATURES,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.roles = [leaf.role for leaf in flat(reads)]
        self.structure = structure
        self.weight = nn.Parameter(draw.normal(features, 6).to(dtype))
        self.bias = nn.Parameter(draw.normal(features).to(dtype))
        self.norm = nn.BatchNorm1d(features, dtype=dtype) if batch_norm else None
        self.in_float = False
        self.fault = "none"

    def forward(self, *inputs: Any) -> Any:
        h = self.features(*inputs)
        return FAULTS[self.fault](STRUCTURES[self.structure](h.float() if self.in_float else h))

    def features(self, *inputs: Any) -> Tensor:
        h: Any = self.bias
        maps: list[Tensor] = []
        for index, (role, part) in enumerate(zip(self.roles, flat(inputs), strict=True)):
            if role in ("shared", "scalar"):
                h = h + part.sum().cos()
            elif role == "number":
                h = h + part
            elif role != "none":
                rows = part.to(self.weight.dtype).flatten(1) if part.ndim > 1 else part[:, None]
                mixed = nn.functional.linear(rows, self.weight[:, : rows.shape[1]])
                maps.append(mixed)
                h = h + mixed * (1 + 0.3 * index)
        if len(maps) > 1:
            h = h + 0.2 * maps[0] * maps[1]
        if self.norm is not None:
            h = self.norm(h[:, :, None].expand(-1, -1, 2) * self.bias.new_tensor((1.0, -0.5)))[
                ..., 0
            ]
        return h.tanh()


class Gate(nn.Module):
    """Logits well apart from each other; `bias` says who is starved."""

    def __init__(self, draw: Draw, reads: Any, dtype: torch.dtype, bias: Tensor) -> None:
        super().__init__()
        self.network = Network(draw, reads, dtype, features=len(bias))
        self.bias = nn.Parameter(bias.to(dtype))

    def forward(self, *inputs: Any) -> Tensor:
        return self.network(*inputs) * 2 + self.bias


IN_PLACE: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky relu": lambda: nn.LeakyReLU(0.1, inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "dropout 0": lambda: nn.Sequential(nn.Dropout(0.0, inplace=True), nn.SiLU(inplace=True)),
}


def begins_in_place(draw: Draw, name: str, network: nn.Module) -> nn.Module:
    first = IN_PLACE[draw.pick(f"in-place layer of {name}", tuple(IN_PLACE))]()
    return nn.Sequential(first, network)


class Writes(nn.Module):
    """Writes into what it reads, by code of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x.mul_(0.5))


def reads_one_tensor(reads: tuple[Any, ...]) -> bool:
    return len(reads) == 1 and isinstance(reads[0], Leaf) and reads[0].role in ("rows", "lazy")
