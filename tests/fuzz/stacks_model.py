"""A random `NestedFusion` or `ChainedFusion`, and what the oracle needs to know of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynmm_kernels import Branch, ChainedFusion, NestedFusion
from dynmm_kernels.nn import Add, Concat, SEAdd, WeightedSum

from .draw import LAYOUTS, Draw, laid_out
from .networks import IN_PLACE

CONTEXTS = {
    "gradients": 10,
    "no_grad": 4,
    "inference": 1.5,
    "inference tensors": 0.5,
    "checkpoint": 0.7,
    "second order": 1.5,
    "forward mode": 0.5,
    "autocast": 0.5,
}
DTYPES = {torch.float64: 14, torch.float32: 1, torch.float16: 0.4, torch.bfloat16: 0.4}
ROWS = {3: 3, 0: 0.7, 1: 2, 2: 2, 4: 3, 5: 3, 6: 2, 7: 2, 8: 1, 9: 1, 33: 0.1}
CHANNELS = 4


class Mix(nn.Module):
    """A linear map of the channels, the same at every position."""

    def __init__(self, draw: Draw, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((0.5 * draw.normal(channels, channels)).to(dtype))
        self.bias = nn.Parameter(draw.normal(channels).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)


class DepthGate(nn.Module):
    """Logits of both streams, well apart."""

    def __init__(self, draw: Draw, reads: int, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw.normal(len(bias), reads).to(dtype))
        self.bias = nn.Parameter(bias.to(dtype))

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        both = torch.cat([main.flatten(1), aux.flatten(1)], 1)
        return 2 * nn.functional.linear(both, self.weight).tanh() + self.bias


class TanhSum(nn.Module):
    """A fusion of a user's own, with a parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return (main * self.scale).tanh() + aux * main


class Replace(nn.Module):
    """Returns the auxiliary stream as it is."""

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return aux


class WriteSum(nn.Module):
    """Adds in place, which the library may refuse."""

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return main.add_(aux)


class Keep(nn.Module):
    """Returns the main stream as it is."""

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return main


STAGES = {
    "mix": 5,
    "silu": 2,
    "identity": 1,
    "in place, then mix": 1.5,
    "in place": 1,
    "batch norm": 0.3,
    "dropout": 0.5,
}
FUSIONS = {
    "add": 3,
    "weighted": 2,
    "concat": 2,
    "se add": 2,
    "own": 2,
    "replace": 0.7,
    "keep": 0.4,
    "writes": 0.15,
}


@dataclass
class Stage:
    """A stage or fusion as the oracle sees it."""

    module: nn.Module
    kind: str
    cost: float | None = None

    @property
    def in_place(self) -> bool:
        return self.kind.startswith("in place")


def draw_stages(draw: Draw, stream: str, length: int, dtype: torch.dtype) -> list[Stage]:
    """Two layers in place in a row are an error in plain PyTorch as well."""
    stages: list[Stage] = []
    for k in range(1, length + 1):
        stage = draw_stage(draw, f"{stream} stage {k}", dtype)
        if stages and stages[-1].kind == "in place" and stage.in_place:
            stage = Stage(Mix(draw, CHANNELS, dtype), "mix")
        stages.append(stage)
    return stages


def draw_stage(draw: Draw, name: str, dtype: torch.dtype) -> Stage:
    kind = draw.pick(name, STAGES)
    mix = Mix(draw, CHANNELS, dtype)
    layer = IN_PLACE[draw.pick(f"layer of {name}", tuple(IN_PLACE))]()
    modules: dict[str, Callable[[], nn.Module]] = {
        "mix": lambda: mix,
        "silu": lambda: nn.Sequential(mix, nn.SiLU()),
        "identity": nn.Identity,
        "in place, then mix": lambda: nn.Sequential(layer, mix),
        "in place": lambda: layer,
        "batch norm": lambda: nn.Sequential(mix, nn.BatchNorm1d(CHANNELS, dtype=dtype)),
        "dropout": lambda: nn.Dropout(0.0),
    }
    return Stage(modules[kind](), kind)


def draw_fusion(draw: Draw, name: str, dtype: torch.dtype) -> Stage:
    kind = draw.pick(name, FUSIONS)
    modules: dict[str, Callable[[], nn.Module]] = {
        "add": Add,
        "weighted": lambda: WeightedSum((0.3, 0.6)),
        "concat": lambda: Concat(CHANNELS),
        "se add": lambda: SEAdd(CHANNELS, 2),
        "own": lambda: TanhSum(dtype),
        "replace": Replace,
        "writes": WriteSum,
        "keep": Keep,
    }
    return Stage(modules[kind]().to(dtype), kind)


@dataclass
class Stack:
    """One case: streams, stages, settings and the call."""

    draw: Draw
    chained: bool
    context: str
    dtype: torch.dtype
    streams: tuple[Tensor, Tensor]
    gates: list[nn.Module | None]
    main: list[Stage]
    aux: list[Stage]
    joins: list[Stage]
    rules: list[str]
    gates_read: str
    fusion: Any
    depth: Any
    wanted: list[int]
    gate_cost: float

    @property
    def length(self) -> int:
        return len(self.main)

    @property
    def num_rows(self) -> int:
        return len(self.streams[0])

    @property
    def forced(self) -> bool:
        return self.depth is not None

    @property
    def uniform(self) -> bool:
        return isinstance(self.depth, str) and self.depth == "uniform"

    @property
    def soft(self) -> bool:
        return self.fusion.execution == "dense" and not self.forced

    @property
    def noisy(self) -> bool:
        noise = self.fusion.noise
        return (
            not self.forced and bool(noise) and (noise == "gumbel_always" or self.fusion.training)
        )

    @property
    def layouts(self) -> tuple[Any, ...]:
        return tuple(self.draw.features.get(f"layout of {name}") for name in ("main", "aux"))

    @property
    def has_norms(self) -> bool:
        return any(part.kind == "batch norm" for part in (*self.main, *self.aux))

    @property
    def subset(self) -> bool:
        """Whether auxiliary BatchNorm layers see only the samples that came so far."""
        whole = self.fusion.execution == "masked" or self.soft or self.uniform
        normed = any(part.kind == "batch norm" for part in self.aux)
        return normed and self.fusion.training and self.fusion.batch_norm == "subset" and not whole

    def __call__(self, *streams: Tensor) -> tuple[list[Tensor], Any]:
        output, routing = self.fusion(
            *(streams or self.streams), depth=self.depth, stages=self.wanted, return_routing=True
        )
        if self.wanted:
            output, stages = output
            return [output, *stages], routing
        return [output], routing

    def learners(self) -> tuple[list[str], list[Tensor]]:
        named = [
            (n, s) for n, s in zip(("main", "aux"), self.streams, strict=True) if s.requires_grad
        ]
        named += [item for item in self.fusion.named_parameters() if item[1].requires_grad]
        return [name for name, _ in named], [tensor for _, tensor in named]


def gate_biases(draw: Draw, length: int, chained: bool) -> list[Tensor]:
    mix = draw.pick("mix", {"mixed": 5, "all the deepest": 1, "all stopped": 1, "few": 1})
    shift = {"mixed": 0.0, "all the deepest": 20.0, "all stopped": -20.0, "few": -2.0}[mix]
    if not chained:
        bias = draw.normal(1 + length)
        bias[-1] += shift
        bias[0] -= shift
        return [bias]
    biases = []
    for _ in range(length):
        bias = draw.normal(2)
        bias[1] += shift / 2 + 0.7
        biases.append(bias)
    return biases


def draw_depth(draw: Draw, length: int, num_rows: int) -> Any:
    kind = draw.pick(
        "depth", {"gate": 12, "int": 1.5, "tensor": 2.5, "random": 0.5, "uniform": 0.7}
    )
    if kind == "int":
        return draw.seed % (length + 1)
    if kind == "tensor":
        return draw.integers(0, length + 1, num_rows)
    return None if kind == "gate" else kind


def draw_stream(draw: Draw, name: str, num_rows: int, maps: bool, dtype: torch.dtype) -> Tensor:
    values = draw.normal(num_rows, CHANNELS, *((2,) if maps else ())).to(dtype)
    values = laid_out(values, draw.pick(f"layout of {name}", LAYOUTS))
    return values.detach().requires_grad_(draw.pick(f"{name} learns", {False: 1, True: 2}))


def draw_stack(draw: Draw, chained: bool) -> Stack:
    context = draw.pick("context", CONTEXTS)
    dtype = draw.pick("dtype", DTYPES)
    if context not in ("gradients", "no_grad"):
        dtype = torch.float32 if context == "autocast" else torch.float64
    num_rows = draw.pick("rows", ROWS)
    length = draw.pick("stages", {2: 4, 1: 2, 3: 4, 4: 1})
    maps = draw.pick("streams", {"features": 2, "maps": 1}) == "maps"
    streams = tuple(draw_stream(draw, name, num_rows, maps, dtype) for name in ("main", "aux"))
    steps = range(1, length + 1)
    main, aux = (draw_stages(draw, stream, length, dtype) for stream in ("main", "aux"))
    joins = [draw_fusion(draw, f"fusion {k}", dtype) for k in steps]
    rules = ["dynamic"] * length
    if chained:
        options = {"dynamic": 4, "fuse": 1, "skip": 1}
        rules = [draw.pick(f"rule {k}", options) for k in steps]
    reads = 2 * CHANNELS * (2 if maps else 1)
    biases = gate_biases(draw, length, chained)
    gates: list[nn.Module | None] = [DepthGate(draw, reads, bias, dtype) for bias in biases]
    if chained:
        gates = [g if rule == "dynamic" else None for g, rule in zip(gates, rules, strict=True)]
    if draw.pick("frozen", {"nothing": 5, "gates": 1}) == "gates":
        for gate in gates:
            if gate is not None:
                gate.requires_grad_(False)
    gate_cost = draw.pick("costs", {False: 1, True: 1}) * 0.25
    if gate_cost:
        for index, part in enumerate((*main, *aux, *joins)):
            part.cost = draw.pick(f"cost {index}", (1.0, 2.5))

    def wrapped(parts: list[Stage]) -> list[nn.Module]:
        return [
            part.module if part.cost is None else Branch(part.module, cost=part.cost)
            for part in parts
        ]

    training = draw.pick("training", (True, False))
    batch_norm = draw.pick("batch norm", ("masked", "subset"))
    normed = training and any(part.kind == "batch norm" for part in aux)
    grads = ("straight_through", "selected", "none")
    settings = {
        "execution": draw.pick("execution", {"routed": 4, "auto": 1, "masked": 1, "dense": 1}),
        "gate_grad": draw.pick(
            "gate_grad", grads[1:] if normed and batch_norm == "subset" else grads
        ),
        "temperature": draw.pick("temperature", (1.0, 0.5, 2.0)),
        "batch_norm": batch_norm,
        "noise": draw.pick("noise", {None: 8, "gumbel": 1, "gumbel_always": 0.5}),
    }
    if dtype is not torch.float64 or (chained and context != "no_grad"):
        settings["noise"] = None
    gates_read = draw.pick("gates read", {"cells": 2, "stages": 1}) if chained else "cells"
    asked = [
        gate if gate is None or not gate_cost else Branch(gate, cost=gate_cost) for gate in gates
    ]
    streams_of = (wrapped(main), wrapped(aux), wrapped(joins))
    fusion: Any = (
        ChainedFusion(asked, *streams_of, rules=rules, gates_read=gates_read, **settings)
        if chained
        else NestedFusion(asked[0], *streams_of, **settings)
    )
    wanted = [k for k in steps if draw.pick(f"output of stage {k}", {False: 2, True: 1})]
    if draw.pick("stages backwards", {False: 3, True: 1}):
        wanted = wanted[::-1]
    depth = draw_depth(draw, length, num_rows)
    return Stack(
        draw, chained, context, dtype, streams, gates, main, aux, joins, rules, gates_read,
        fusion.train(training), depth, wanted, gate_cost,
    )  # fmt: skip
