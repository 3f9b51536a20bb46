"""What a module costs per sample: multiply-accumulates counted by torch, or time measured."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from . import tree


def branch_costs(module: nn.Module, example_inputs: Any, unit: str = "macs") -> float:
    """Cost of one sample.

    Args:
        module: a branch or a gate; a `Branch` selects its modalities itself.
        example_inputs: the arguments, a tuple (or one argument): tensors [N, ...] in any nesting.
        unit: "macs": multiply-accumulates of matrix products, convolutions and attention, by
            `torch.utils.flop_counter`; elementwise work is not counted. "ms": median wall time
            of a forward pass of the example batch, without a graph, divided by N.

    Raises:
        ValueError: unknown unit, or inputs without a sample.
    """
    if unit not in ("macs", "ms"):
        raise ValueError(f"branch_costs: unit must be 'macs' or 'ms'; got {unit!r}")
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    _, num_rows = tree.find_rows(tree.flatten(arguments)[0], "branch_costs inputs")
    if not num_rows:
        raise ValueError("branch_costs: example_inputs must hold at least one sample")
    total = _macs(module, arguments) if unit == "macs" else _milliseconds(module, arguments)
    return total / num_rows


def _macs(module: nn.Module, arguments: tuple[Any, ...]) -> float:
    # The fused attention of eval mode, and that of the CPU, are ops the counter does not see into.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            module(*arguments)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() / 2


def _milliseconds(module: nn.Module, arguments: tuple[Any, ...], rounds: int = 7) -> float:
    def run() -> float:
        _synchronise(arguments)
        start = time.perf_counter()
        with torch.no_grad():
            module(*arguments)
        _synchronise(arguments)
        return time.perf_counter() - start

    run()
    return statistics.median(run() for _ in range(rounds)) * 1e3


def _synchronise(arguments: tuple[Any, ...]) -> None:
    leaves = tree.flatten(arguments)[0]
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves):
        torch.cuda.synchronize()
