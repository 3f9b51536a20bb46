"""Calls of every module, over and over: neither tensors nor resident memory may grow."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dynmm_kernels import Branch, ChainedFusion, NestedFusion, RoutedFusion
from dynmm_kernels.nn import Add, Concat, SEAdd, WeightedSum

ROWS, WIDTH = 8, 6
NOISE_KIB = 4096


class PairGate(nn.Module):
    def __init__(self, logits: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, logits)

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return self.linear(torch.cat([main.flatten(1), aux.flatten(1)], 1))


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(WIDTH, WIDTH) for _ in range(count)]


def modules() -> dict[str, Callable[[], nn.Module]]:
    """Every module, as takes two tensors [n, WIDTH]."""

    def routed(**settings) -> nn.Module:
        branches = [Branch(layer, inputs=[0]) for layer in linears(3)]
        return RoutedFusion(PairGate(3), branches, **settings)

    return {
        "RoutedFusion": routed,
        "RoutedFusion, top 2": lambda: routed(select=2),
        "RoutedFusion, multi-hot": lambda: routed(select="multi_hot"),
        "NestedFusion of SEAdd": lambda: NestedFusion(
            PairGate(3), linears(2), linears(2), [SEAdd(WIDTH), SEAdd(WIDTH)]
        ),
        "ChainedFusion": lambda: ChainedFusion(
            [PairGate(2), None, PairGate(2)],
            linears(3), linears(3), [Add(), WeightedSum(), Concat(WIDTH)],
        ),
        "SEAdd": lambda: SEAdd(WIDTH),
    }  # fmt: skip


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(part), Tensor) for part in gc.get_objects())


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def step(module: nn.Module, learning: bool) -> None:
    main, aux = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    if learning:
        module(main, aux).sum().backward()
    else:
        with torch.no_grad():
            module(main, aux)


def growth(module: nn.Module, learning: bool, calls: int) -> tuple[int, int]:
    """Tensors and KiB that `calls` calls leave behind, after some that warm up."""
    module.train(learning)
    for _ in range(50):
        step(module, learning)
    tensors, memory = live_tensors(), resident_kib()
    for _ in range(calls):
        step(module, learning)
    return live_tensors() - tensors, resident_kib() - memory


def report(calls: int) -> Iterator[tuple[str, bool, int, int]]:
    """Name, learning, tensors and KiB for every module."""
    for name, make in modules().items():
        for learning in (False, True):
            yield name, learning, *growth(make(), learning, calls)
