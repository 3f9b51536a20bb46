"""Gather and combine as ops that a traced graph holds, differentiable and for sizes it is not told.

Compilers do not look into autograd functions of this kind; into these ops they see the functions
run, and find the kernels' own traced overloads in their place. An exported program keeps the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.schemas import NAMESPACE, library
from . import autograd, learning
from .plan import RoutingPlan

Function = Callable[..., Any]


def _op(schema: str) -> Callable[[Function], Function]:
    name = schema.partition("(")[0]

    def define(function: Function) -> Function:
        library.define(schema)
        library.impl(name, function, "CompositeImplicitAutograd")
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return define


@_op(
    "take(Tensor[] sources, int[] index, SymInt[] starts, SymInt[] stops, Tensor order,"
    " Tensor filled, Tensor inverse) -> Tensor[]"
)
def take(
    sources: list[Tensor],
    index: Sequence[int],
    starts: list[int],
    stops: list[int],
    order: Tensor,
    filled: Tensor,
    inverse: Tensor,
) -> list[Tensor]:
    with ops.using(ops.serving().traced):
        return autograd.take(_plan(order, inverse), filled, sources, index, starts, stops)


@_op(
    "put(Tensor[] outputs, SymInt[] starts, Tensor order, Tensor inverse, Tensor? weights)"
    " -> Tensor"
)
def put(
    outputs: list[Tensor],
    starts: list[int],
    order: Tensor,
    inverse: Tensor,
    weights: Tensor | None,
) -> Tensor:
    with ops.using(ops.serving().traced):
        return autograd.combine(_plan(order, inverse), outputs, starts, weights)


@_op(
    "put_selected(Tensor[] rows, SymInt[] starts, int count, Tensor probs, Tensor index,"
    " Tensor order, Tensor inverse) -> Tensor"
)
def put_selected(
    rows: list[Tensor],
    starts: list[int],
    count: int,
    probs: Tensor,
    index: Tensor,
    order: Tensor,
    inverse: Tensor,
) -> Tensor:
    plan = _plan(order, inverse)
    with ops.using(ops.serving().traced):
        return learning.CombineSelected.apply(
            plan, starts[:count], starts[count:], index, count, None, probs, *rows
        )


def _plan(order: Tensor, inverse: Tensor) -> RoutingPlan:
    """What movement needs of a plan."""
    return RoutingPlan(order, inverse, order, 0)
