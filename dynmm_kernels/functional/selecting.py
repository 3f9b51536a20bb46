"""Masked execution that selects: what was not chosen is left out, not multiplied by zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def select(
    outputs: Sequence[Tensor], chosen: Tensor, alone: bool = False, out: Tensor | None = None
) -> Tensor:
    """out[n] = the sum of the outputs[b][n] that were chosen; zeros where none was.

    Args:
        outputs: B floating or complex tensors [N, ...] of one shape and dtype.
        chosen: bool [N, B].
        alone: no sample chose more than one.
        out: where to write it.
    """
    total: Tensor | None = None
    for column, output in zip(columns(chosen, outputs[0]), outputs, strict=True):
        if total is None or not alone:
            own = torch.where(column, output, 0)
            total = own if total is None else total + own
        else:
            total = torch.where(column, output, total)
    assert total is not None  # there is a branch
    return total if out is None else out.copy_(total)


def select_sorted(
    outputs: Sequence[Tensor], slots: Tensor, starts: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """`select` where every sample chose one branch, for outputs of any dtype; B is 2 at least.

    `slots`: [N, 1], its place in the order by branches, which begin at `starts`.
    """
    total, last = outputs[0], len(outputs) - 1
    slots = slots.view(-1, *[1] * (total.ndim - 1))
    for b in range(1, last):
        total = torch.where(slots >= starts[b], outputs[b], total)
    return torch.where(slots >= starts[last], outputs[last], total, out=out)


def select_learning(
    outputs: Sequence[Tensor], weights: Tensor, write: Callable[[Tensor], Any]
) -> Tensor:
    """What `write(out)` selects, with the graph of sum_b weights[:, b] * outputs[b].

    The sum has these values, unless what it multiplies by zero is nan or inf: then they are written
    over it. Its last step keeps nothing of its result for the backward pass.

    `weights`: [N, B], zeros and ones with the gradient of a gate; B is 2 at least.
    """
    first, *others = columns(weights, outputs[0])
    total = first * outputs[0]
    for column, output in zip(others, outputs[1:], strict=True):
        total = total + column * output
    total = total.to(outputs[0].dtype)
    values = total.detach()
    if not (values.is_cpu and math.isfinite(abs(values.sum().item()))):  # a GPU is not waited for
        with torch.no_grad():
            write(values)
    return total


def columns(weights: Tensor, output: Tensor) -> Sequence[Tensor]:
    """Of [N, B], to be broadcast over the rows of `output`."""
    return weights.view(*weights.shape, *[1] * (output.ndim - 1)).unbind(1)
