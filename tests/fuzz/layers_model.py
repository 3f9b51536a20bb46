"""Random `SkipLayer`s in a row, or a random `EarlyExit`, and what the oracle needs to know."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynmm_kernels import Branch, EarlyExit, SkipLayer

from .draw import LAYOUTS, Draw, laid_out
from .stacks_model import CHANNELS, ROWS, Stage, draw_stages

CONTEXTS = {
    "gradients": 10,
    "no_grad": 4,
    "inference": 1.5,
    "second order": 1.5,
    "forward mode": 0.5,
}
DTYPES = {torch.float64: 14, torch.float32: 1, torch.float16: 0.4, torch.bfloat16: 0.4}


class Scaled(nn.Module):
    """A layer that reads a factor beside its rows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale.view(-1, *[1] * (x.ndim - 1))


class Gate(nn.Module):
    """Logits well apart; `bias` says what nobody takes."""

    def __init__(self, draw: Draw, reads: int, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw.normal(len(bias), reads).to(dtype))
        self.bias = nn.Parameter(bias.to(dtype))

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x.flatten(1), self.weight).tanh() + self.bias


class Head(nn.Module):
    """Fewer features, of maps as well."""

    def __init__(self, draw: Draw, reads: int, dtype: torch.dtype, in_place: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw.normal(3, reads).to(dtype))
        self.first = nn.LeakyReLU(0.3, inplace=in_place)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x).flatten(1), self.weight)


@dataclass
class Stream:
    """One case: tensors, layers, settings and the call.

    Attributes:
        module: the `EarlyExit`, or the list of `SkipLayer`s.
        heads: one for each depth, one for all, or none.
        told: the decision that is forced: of each layer, or the depth. None: gates decide.
        routings: of the last call.
    """

    draw: Draw
    context: str
    x: Tensor
    scale: Tensor | None
    layers: list[Stage]
    heads: list[nn.Module]
    gates: list[nn.Module]
    module: Any
    told: Any
    routings: list[Any]

    @property
    def settings(self) -> Any:
        return self.module[0] if isinstance(self.module, nn.ModuleList) else self.module

    @property
    def others(self) -> tuple[Tensor, ...]:
        return () if self.scale is None else (self.scale,)

    @property
    def noisy(self) -> bool:
        noise, forced = self.settings.noise, self.told is not None
        return not forced and (
            noise == "gumbel_always" or (noise == "gumbel" and self.settings.training)
        )

    @property
    def has_norms(self) -> bool:
        normed = any(layer.kind == "batch norm" for layer in self.layers)
        return normed and self.settings.training

    @property
    def uniform(self) -> bool:
        return isinstance(self.told, str) and self.told == "uniform"

    @property
    def soft(self) -> bool:
        return self.uniform or (self.settings.execution == "dense" and self.told is None)

    @property
    def subset(self) -> bool:
        """Whether BatchNorm sees only the samples that run."""
        routed = self.settings.execution != "masked" and not self.soft
        return self.has_norms and routed and self.settings.batch_norm == "subset"

    def __call__(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        self.routings = []
        if isinstance(self.module, EarlyExit):
            y, routing = self.module(x, *self.others, depth=self.told, return_routing=True)
            self.routings.append(routing)
            return y
        for k, skip in enumerate(self.module):
            keep = None if self.told is None else self.told[k]
            x, routing = skip(x, *self.others, keep=keep, return_routing=True)
            self.routings.append(routing)
        return x

    def learners(self) -> tuple[list[str], list[Tensor]]:
        named = [("x", self.x), ("scale", self.scale), *self.module.named_parameters()]
        if isinstance(self.told, list):
            named += [(f"keep {k}", keep) for k, keep in enumerate(self.told)]
        kept = [
            (name, tensor)
            for name, tensor in named
            if isinstance(tensor, Tensor) and tensor.requires_grad
        ]
        return [name for name, _ in kept], [tensor for _, tensor in kept]


def biases(draw: Draw, columns: int, count: int) -> list[Tensor]:
    mix = draw.pick("mix", {"mixed": 5, "all the last": 1, "all the first": 1, "few": 1})
    shift = {"mixed": 0.0, "all the last": 20.0, "all the first": -20.0, "few": -2.0}[mix]
    drawn = [draw.normal(columns) for _ in range(count)]
    for bias in drawn:
        bias[-1] += shift
        bias[0] -= shift
    return drawn


def draw_keep(draw: Draw, length: int, num_rows: int, dtype: torch.dtype) -> Any:
    kind = draw.pick("decision", {"gate": 8, "bools": 2, "weights": 3, "one for all": 1})
    if kind == "gate":
        return None
    if kind == "one for all":
        return [bool(kept) for kept in draw.integers(0, 2, length)]
    keeps = draw.integers(0, 2, length, num_rows)
    if kind == "bools":
        return [*keeps.bool()]
    learns = draw.pick("weights learn", {True: 3, False: 1})
    return [keep.to(dtype).requires_grad_(learns) for keep in keeps]


def draw_depth(draw: Draw, length: int, num_rows: int) -> Any:
    options = {"gate": 10, "int": 1.5, "tensor": 2.5, "random": 0.5, "uniform": 0.7}
    kind = draw.pick("decision", options)
    if kind == "int":
        return draw.seed % (length + 1)
    if kind == "tensor":
        return draw.integers(0, length + 1, num_rows)
    return None if kind == "gate" else kind


def draw_stream(draw: Draw, exits: bool) -> Stream:
    context = draw.pick("context", CONTEXTS)
    dtype = draw.pick("dtype", DTYPES)
    if context not in ("gradients", "no_grad"):
        dtype = torch.float64
    num_rows, length = draw.pick("rows", ROWS), draw.pick("layers", {2: 4, 1: 2, 3: 4, 4: 1})
    maps = draw.pick("rows are", {"features": 2, "maps": 1}) == "maps"
    values = draw.normal(num_rows, CHANNELS, *((2,) if maps else ())).to(dtype)
    x = laid_out(values, draw.pick("layout of x", LAYOUTS)).detach()
    x.requires_grad_(draw.pick("x learns", {True: 3, False: 1}))
    scale = None
    if draw.pick("reads a factor", {False: 1, True: 1}):
        scale = draw.normal(num_rows).to(dtype)
        scale.requires_grad_(draw.pick("factor learns", {False: 1, True: 1}))
    layers = draw_stages(draw, "layer", length, dtype)
    reads = CHANNELS * (2 if maps else 1)
    count, columns = (1, 1 + length) if exits else (length, 2)
    gates: list[nn.Module] = [
        Gate(draw, reads, bias, dtype) for bias in biases(draw, columns, count)
    ]
    if draw.pick("frozen", {"nothing": 5, "gates": 1}) == "gates":
        for gate in gates:
            gate.requires_grad_(False)
    heads: list[nn.Module] = []
    if exits:
        form = draw.pick("heads", {"none": 2, "each": 2, "one": 1})
        number = {"none": 0, "one": 1, "each": 1 + length}[form]
        in_place = draw.pick("heads write", {False: 3, True: 1})
        heads = [Head(draw, reads, dtype, in_place) for _ in range(number)]

    training = draw.pick("training", (True, False))
    batch_norm = draw.pick("batch norm", ("masked", "subset"))
    normed = training and any(layer.kind == "batch norm" for layer in layers)
    grads = ("straight_through", "selected", "none")
    settings: dict[str, Any] = {
        "execution": draw.pick("execution", {"routed": 4, "auto": 1, "masked": 1, "dense": 1}),
        "gate_grad": draw.pick(
            "gate_grad", grads[1:] if normed and batch_norm == "subset" else grads
        ),
        "temperature": draw.pick("temperature", (1.0, 0.5, 2.0)),
        "batch_norm": batch_norm,
        "noise": draw.pick("noise", {None: 8, "gumbel": 1, "gumbel_always": 0.5}),
    }
    if dtype is not torch.float64:
        settings["noise"] = None
    called = [layer.module if scale is None else Scaled(layer.module) for layer in layers]
    if draw.pick("costs", {False: 1, True: 1}):
        called = [Branch(module, cost=1.0 + k) for k, module in enumerate(called)]
    module: nn.Module
    told: Any
    if exits:
        own = None if not heads else heads[0] if len(heads) == 1 else heads
        module = EarlyExit(gates[0], called, own, **settings)
        told = draw_depth(draw, length, num_rows)
    else:
        told = draw_keep(draw, length, num_rows, dtype)
        module = nn.ModuleList(
            SkipLayer(layer, gate if told is None else None, **settings)
            for layer, gate in zip(called, gates, strict=True)
        )
    module.train(training)
    return Stream(draw, context, x, scale, layers, heads, gates, module, told, [])
