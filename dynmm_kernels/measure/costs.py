"""What a module costs per sample: multiply-accumulates counted by torch, or time measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..functional import tree
from ..nn.arguments import Arguments
from ..nn.branch import Branch
from .timing import Effort, interleave

SEVEN = Effort(seconds=0.0, rounds=(7, 7), sample=0.0)


def branch_costs(module: nn.Module, example_inputs: Any, unit: str = "macs") -> float:
    """Cost of one sample.

    Args:
        module: a branch or a gate; a `Branch` selects its modalities itself.
        example_inputs: the arguments, a tuple (or one argument): tensors [N, ...] in any nesting,
            with `Shared` and `Lazy` as a fusion takes them.
        unit: "macs": multiply-accumulates of matrix products, convolutions, attention, recurrent
            and bilinear layers, by `torch.utils.flop_counter`; elementwise work is not counted.
            "ms": median wall time of a forward pass of the example batch, divided by N.

    The module is measured in eval mode, without a graph, and left as it was.

    Raises:
        ValueError: unknown unit, or inputs without a sample.
    """
    if unit not in ("macs", "ms"):
        raise ValueError(f"branch_costs: unit must be 'macs' or 'ms'; got {unit!r}")
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    batch = Arguments(given, "branch_costs inputs")
    num_rows = batch.num_rows
    if not num_rows:
        raise ValueError("branch_costs: example_inputs must hold at least one sample")
    own = module.arguments(batch) if isinstance(module, Branch) else batch
    measured = module.module if isinstance(module, Branch) else module
    arguments = own.whole(num_rows)
    measure = _macs if unit == "macs" else _milliseconds
    with _in_eval_mode(module), torch.no_grad():
        return measure(measured, arguments) / num_rows


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """So that the examples leave no trace in the statistics of BatchNorm."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _macs(module: nn.Module, arguments: tuple[Any, ...]) -> float:
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._trilinear: _trilinear_flops}
    )
    with _countable(), counter:
        module(*arguments)
    return counter.get_total_flops() / 2


@contextmanager
def _countable() -> Iterator[None]:
    """Without the fused attention and recurrent layers, into which the counter does not see."""
    backends: Any = torch.backends
    before = backends.mha.get_fastpath_enabled(), backends.mkldnn.enabled, backends.cudnn.enabled
    backends.mha.set_fastpath_enabled(False)
    backends.mkldnn.enabled = backends.cudnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        backends.mha.set_fastpath_enabled(before[0])
        backends.mkldnn.enabled, backends.cudnn.enabled = before[1:]


def _trilinear_flops(
    first: torch.Size,
    weight: torch.Size,
    second: torch.Size,
    expand_first: list[int],
    expand_weight: list[int],
    expand_second: list[int],
    *_: Any,
    **__: Any,
) -> int:
    """nn.Bilinear: two per element of what its three operands broadcast to."""
    shapes = []
    for shape, expanded in (
        (first, expand_first),
        (weight, expand_weight),
        (second, expand_second),
    ):
        sizes = [*shape]
        for dim in sorted(expanded):
            sizes.insert(dim, 1)
        shapes.append(sizes)
    return 2 * math.prod(torch.broadcast_shapes(*shapes))


def _milliseconds(module: nn.Module, arguments: tuple[Any, ...]) -> float:
    leaves = tree.flatten(arguments)[0]
    on_gpu = any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves)
    seconds = interleave({"module": lambda: module(*arguments)}, SEVEN, "cuda" if on_gpu else "cpu")
    return 1e3 * median(seconds["module"])
