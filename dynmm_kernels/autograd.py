"""Derivatives: gather and combine are each other's transpose, row dots the gradient of weights.

The three are closed under differentiation, so derivatives of any order are exact and run on the
same kernels. Where no graph is recorded the ops are called directly.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .plan import RoutingPlan


def gather(
    plan: RoutingPlan,
    sources: list[Tensor],
    index: Sequence[int],
    starts: list[int],
    stops: list[int],
    weights: Tensor | None,
) -> list[Tensor]:
    if torch.is_grad_enabled() and _any_requires_grad(sources, weights):
        return list(_GatherRows.apply(plan, index, starts, stops, weights, *sources))
    repeated = [sources[i] for i in index]
    return ops.kernels().gather_rows(repeated, starts, stops, plan.order, plan.ranks, weights)


def combine(
    plan: RoutingPlan, outputs: Sequence[Tensor], starts: list[int], weights: Tensor | None
) -> Tensor:
    if torch.is_grad_enabled() and _any_requires_grad(outputs, weights):
        return _CombineRows.apply(plan, starts, weights, *outputs)
    return ops.kernels().combine_rows(outputs, starts, plan.inverse, weights)


def row_dots(
    rows: Tensor, outputs: Sequence[Tensor], starts: list[int], plan: RoutingPlan
) -> Tensor:
    if torch.is_grad_enabled() and _any_requires_grad(outputs, rows):
        return _RowDots.apply(plan, starts, rows, *outputs)
    return ops.kernels().row_dots(rows, outputs, starts, plan.inverse)


class _Refuse(torch.autograd.Function):
    """`tensor`, through which no further derivative goes."""

    @staticmethod
    def forward(ctx, tensor, anchor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "dynmm_kernels: a second derivative through the gate's straight-through gradient or "
            "through se_add is not offered; detach what needs none, or use masked execution and "
            "plain PyTorch"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's, but it refuses also where only saved tensors, not `grad`, have a graph."""

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        return tuple(
            _Refuse.apply(result, torch.zeros((), requires_grad=True))
            if isinstance(result, Tensor)
            else result
            for result in results
        )

    return wrapper


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, index, starts, stops, weights, *sources):
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.index, ctx.starts = plan, index, starts
        ctx.save_for_backward(weights, *(sources if weights is not None else ()))
        ctx.num_sources = len(sources)
        repeated = [sources[i] for i in index]
        gathered = ops.kernels().gather_rows(
            repeated, starts, stops, plan.order, plan.ranks, weights
        )
        fixed = [
            out
            for out, i in zip(gathered, index, strict=True)
            if not (weights is not None or sources[i].requires_grad) or not _differentiable(out)
        ]
        ctx.mark_non_differentiable(*fixed)
        return tuple(gathered)

    @staticmethod
    def backward(ctx, *grads):
        weights, *sources = ctx.saved_tensors
        source_grads: list[Tensor | None] = []
        weight_grad = None
        for i in range(ctx.num_sources):
            own = [m for m, of in enumerate(ctx.index) if of == i and grads[m] is not None]
            own.sort(key=lambda m: ctx.starts[m])
            parts, starts = [grads[m] for m in own], [ctx.starts[m] for m in own]
            wanted = ctx.needs_input_grad[5 + i] and parts
            source_grads.append(combine(ctx.plan, parts, starts, weights) if wanted else None)
            if ctx.needs_input_grad[4] and parts:
                dots = row_dots(sources[i], parts, starts, ctx.plan)
                weight_grad = dots if weight_grad is None else weight_grad + dots
        return None, None, None, None, weight_grad, *source_grads


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, starts, weights, *outputs):
        ctx.plan, ctx.starts = plan, starts
        ctx.stops = [start + out.shape[0] for start, out in zip(starts, outputs, strict=True)]
        ctx.save_for_backward(weights, *(outputs if weights is not None else ()))
        return ops.kernels().combine_rows(outputs, starts, plan.inverse, weights)

    @staticmethod
    def backward(ctx, grad):
        weights, *outputs = ctx.saved_tensors
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        grads: list[Tensor | None] = [None] * len(ctx.starts)
        if wanted:
            starts = [ctx.starts[i] for i in wanted]
            stops = [ctx.stops[i] for i in wanted]
            rows = gather(ctx.plan, [grad], [0] * len(wanted), starts, stops, weights)
            for i, row_grad in zip(wanted, rows, strict=True):
                grads[i] = row_grad
        dots = row_dots(grad, outputs, ctx.starts, ctx.plan) if ctx.needs_input_grad[2] else None
        return None, None, dots, *grads


class _RowDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, starts, rows, *outputs):
        ctx.plan, ctx.starts = plan, starts
        ctx.save_for_backward(rows, *outputs)
        return ops.kernels().row_dots(rows, outputs, starts, plan.inverse)

    @staticmethod
    def backward(ctx, grad):
        rows, *outputs = ctx.saved_tensors
        stops = [start + out.shape[0] for start, out in zip(ctx.starts, outputs, strict=True)]
        row_grad = combine(ctx.plan, outputs, ctx.starts, grad) if ctx.needs_input_grad[2] else None
        grads: Sequence[Tensor | None] = [None] * len(outputs)
        if any(ctx.needs_input_grad[3:]):
            grads = gather(ctx.plan, [rows], [0] * len(outputs), ctx.starts, stops, grad)
        return None, None, row_grad, *grads


class CombineSelected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, starts, other_starts, index, num_outputs, probs, *rows):
        outputs = rows[:num_outputs]
        ctx.plan, ctx.starts, ctx.all_starts = plan, starts, [*starts, *other_starts]
        ctx.probs_dtype = probs.dtype
        ctx.save_for_backward(index, *(row.detach() for row in rows))
        return ops.kernels().combine_rows(outputs, starts, plan.inverse, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        index, *rows = ctx.saved_tensors
        kernels = ops.kernels()
        num_outputs = len(ctx.starts)
        stops = [s + row.shape[0] for s, row in zip(ctx.starts, rows[:num_outputs], strict=True)]
        grads = kernels.gather_rows(
            [grad] * num_outputs, ctx.starts, stops, ctx.plan.order, ctx.plan.ranks, None
        )
        dots = kernels.row_dots(grad, rows, ctx.all_starts, index).to(ctx.probs_dtype)
        return None, None, None, None, None, dots, *grads, *[None] * (len(rows) - num_outputs)


class FusePrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, num_parts, weights, *rows):
        ctx.sizes = [part.shape[0] for part in rows]
        ctx.num_parts, ctx.weights_dtype = num_parts, weights.dtype
        ctx.save_for_backward(index, *(part.detach() for part in rows))
        return torch.cat(rows[:num_parts])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        index, *rows = ctx.saved_tensors
        starts = [0, *itertools.accumulate(ctx.sizes[:-1])]
        dots = ops.kernels().row_dots(grad, rows, starts, index).to(ctx.weights_dtype)
        parts = grad.split(ctx.sizes[: ctx.num_parts])
        return None, None, dots, *parts, *[None] * (len(rows) - ctx.num_parts)


class Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, *tensors):
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        zeros = [
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.like
        ]
        return grad, *zeros


def _any_requires_grad(tensors: Sequence[Tensor], other: Tensor | None) -> bool:
    if other is not None and other.requires_grad:
        return True
    return any(tensor.requires_grad for tensor in tensors)


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
