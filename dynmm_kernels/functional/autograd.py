"""Derivatives: gather and combine are each other's transpose, row dots the gradient of weights.

The three are closed under differentiation, so derivatives of any order, backward and forward, are
exact and run on the same kernels. Where no derivative is recorded the ops are called directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops
from .plan import RoutingPlan


def gather(
    plan: RoutingPlan,
    sources: list[Tensor],
    index: Sequence[int],
    starts: list[int],
    stops: list[int],
    weights: Tensor | None,
) -> list[Tensor]:
    if _recorded(sources, weights):
        return list(_GatherRows.apply(plan, index, starts, stops, weights, *sources))
    if weights is not None or plan.lent is not None:
        return _gather(plan, plan.order, sources, index, starts, stops, weights)
    repeated = [sources[i] for i in index]
    return ops.kernels().gather_rows(repeated, starts, stops, plan.order, plan.ranks)


def take(
    plan: RoutingPlan,
    filled: Tensor,
    sources: list[Tensor],
    index: Sequence[int],
    starts: list[int],
    stops: list[int],
) -> list[Tensor]:
    """`gather` by another order, whose rows that are not in the plan get no derivative."""
    if _recorded(sources, None):
        return list(_TakeRows.apply((plan, filled), index, starts, stops, None, *sources))
    return _gather(plan, filled, sources, index, starts, stops, None)


def _gather(
    plan: RoutingPlan,
    order: Tensor,
    sources: Sequence[Tensor],
    index: Sequence[int],
    starts: list[int],
    stops: list[int],
    weights: Tensor | None,
) -> list[Tensor]:
    if plan.lent is not None and plan.lent in starts:
        return _gather_or_lend(plan, sources, index, starts, stops, weights)
    repeated = [sources[i] for i in index]
    if weights is not None and (lacking := order.shape[0] - weights.numel()):  # a filled plan
        weights = torch.nn.functional.pad(weights.flatten(), (0, lacking))
    return ops.kernels().gather_rows(repeated, starts, stops, order, plan.ranks, weights)


def _gather_or_lend(
    plan: RoutingPlan,
    sources: Sequence[Tensor],
    index: Sequence[int],
    starts: list[int],
    stops: list[int],
    weights: Tensor | None,
) -> list[Tensor]:
    """`_gather` where some of the ranges are the whole batch, which is not copied.

    It holds rows that stand in other slots as well; `combine` reads these there.
    """
    moved = [m for m, start in enumerate(starts) if start != plan.lent]
    parts = [index[m] for m in moved], [starts[m] for m in moved], [stops[m] for m in moved]
    rows = iter(_gather(plan, plan.order, sources, *parts, weights) if moved else ())
    results = []
    for i, start in zip(index, starts, strict=True):
        if start != plan.lent:
            results.append(next(rows))
            continue
        whole = sources[i]
        if weights is not None:
            whole = (weights.view(-1, *[1] * (whole.ndim - 1)) * whole).to(whole.dtype)
        elif follows_forward():  # which asks for outputs that are no inputs
            whole = whole.clone()
        results.append(whole)
    return results


def combine(
    plan: RoutingPlan, outputs: Sequence[Tensor], starts: list[int], weights: Tensor | None
) -> Tensor:
    if _recorded(outputs, weights):
        return _CombineRows.apply(plan, starts, weights, *outputs)
    return ops.kernels().combine_rows(outputs, starts, plan.inverse, weights)


def row_dots(
    rows: Tensor, outputs: Sequence[Tensor], starts: list[int], plan: RoutingPlan
) -> Tensor:
    if _recorded(outputs, rows):
        return _RowDots.apply(plan, starts, rows, *outputs)
    return ops.kernels().row_dots(rows, outputs, starts, plan.inverse)


def is_followed(tensor: Tensor) -> bool:
    """Whether a derivative with respect to `tensor` is being recorded, backward or forward."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return follows_forward() and forward_ad.unpack_dual(tensor).tangent is not None


def follows_forward() -> bool:
    """Whether forward-mode derivatives are being computed."""
    return forward_ad._current_level >= 0


def on_backend_of_forward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Runs on `ctx.kernels`: autograd may call from another thread, or behind a `backend` block."""

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        if torch.compiler.is_dynamo_compiling():
            return backward(ctx, *grads)
        with ops.using(ctx.kernels):
            return backward(ctx, *grads)

    return wrapper


class Function(torch.autograd.Function):
    """An autograd function called directly, without binding arguments to a signature.

    torch does that where there is a `setup_context`; it takes longer than a small op.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        """One call after the other, as for the columns of a Jacobian: the plan is that of all."""
        calls = []
        for i in range(info.batch_size):
            own = [
                arg.select(dim, i) if isinstance(dim, int) else arg
                for arg, dim in zip(args, in_dims, strict=True)
            ]
            calls.append(cls.apply(*own))
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        outputs = tuple(torch.stack(column) for column in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)


class _GatherRows(Function):
    @staticmethod
    def forward(plan, index, starts, stops, weights, *sources):
        return tuple(_gather(plan, plan.order, sources, index, starts, stops, weights))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernels = ops.serving()
        ctx.plan, ctx.index, ctx.starts, ctx.stops, weights, *sources = inputs
        ctx.set_materialize_grads(False)
        ctx.num_sources = len(sources)
        kept = (weights, *(sources if weights is not None else ()))
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        followed = weights is not None or follows_forward()
        fixed = [
            out
            for out, i in zip(output, ctx.index, strict=True)
            if not (followed or sources[i].requires_grad) or not _differentiable(out)
        ]
        ctx.mark_non_differentiable(*fixed)
        if follows_forward():
            ctx.like = [(out.shape, out.dtype, out.device) for out in output]

    @staticmethod
    @on_backend_of_forward
    def backward(ctx, *grads):
        weights, *sources = ctx.saved_tensors
        source_grads: list[Tensor | None] = []
        weight_grad = None
        for i in range(ctx.num_sources):
            own = [m for m, of in enumerate(ctx.index) if of == i and grads[m] is not None]
            if ops.are_known(*ctx.starts):  # else they ascend
                own.sort(key=lambda m: ctx.starts[m])
            parts, starts = [grads[m] for m in own], [ctx.starts[m] for m in own]
            wanted = ctx.needs_input_grad[5 + i] and parts
            source_grads.append(combine(ctx.plan, parts, starts, weights) if wanted else None)
            if ctx.needs_input_grad[4] and parts:
                dots = row_dots(sources[i], parts, starts, ctx.plan)
                weight_grad = dots if weight_grad is None else weight_grad + dots
        return None, None, None, None, weight_grad, *source_grads

    @staticmethod
    def jvp(ctx, _plan, _index, _starts, _stops, weight_tangent, *tangents):
        weights, *sources = ctx.saved_tensors
        results = []
        for m, (i, start, stop) in enumerate(zip(ctx.index, ctx.starts, ctx.stops, strict=True)):
            terms = []
            if tangents[i] is not None:
                terms += gather(ctx.plan, [tangents[i]], [0], [start], [stop], weights)
            if weight_tangent is not None:
                terms += gather(ctx.plan, [sources[i]], [0], [start], [stop], weight_tangent)
            shape, dtype, device = ctx.like[m]
            if not terms and (dtype.is_floating_point or dtype.is_complex):
                terms.append(torch.zeros(shape, dtype=dtype, device=device))
            results.append(_sum(terms))
        return tuple(results)


class _TakeRows(_GatherRows):
    @staticmethod
    def forward(plans, index, starts, stops, weights, *sources):
        plan, filled = plans
        return tuple(_gather(plan, filled, sources, index, starts, stops, weights))

    @staticmethod
    def setup_context(ctx, inputs, output):
        (plan, _), *others = inputs
        _GatherRows.setup_context(ctx, (plan, *others), output)


class _CombineRows(Function):
    @staticmethod
    def forward(plan, starts, weights, *outputs):
        return ops.kernels().combine_rows(outputs, starts, plan.inverse, weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernels = ops.serving()
        ctx.plan, ctx.starts, weights, *outputs = inputs
        ctx.stops = [start + out.shape[0] for start, out in zip(ctx.starts, outputs, strict=True)]
        kept = (weights, *(outputs if weights is not None else ()))
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    @on_backend_of_forward
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

    @staticmethod
    def jvp(ctx, _plan, _starts, weight_tangent, *tangents):
        weights, *outputs = ctx.saved_tensors
        terms = []
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
        if moving:
            rows, starts = [tangents[i] for i in moving], [ctx.starts[i] for i in moving]
            terms.append(combine(ctx.plan, rows, starts, weights))
        if weight_tangent is not None:
            terms.append(combine(ctx.plan, outputs, ctx.starts, weight_tangent))
        return _sum(terms)


class _RowDots(Function):
    @staticmethod
    def forward(plan, starts, rows, *outputs):
        return ops.kernels().row_dots(rows, outputs, starts, plan.inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernels = ops.serving()
        ctx.plan, ctx.starts, rows, *outputs = inputs
        ctx.save_for_backward(rows, *outputs)
        ctx.save_for_forward(rows, *outputs)

    @staticmethod
    @on_backend_of_forward
    def backward(ctx, grad):
        rows, *outputs = ctx.saved_tensors
        stops = [start + out.shape[0] for start, out in zip(ctx.starts, outputs, strict=True)]
        row_grad = combine(ctx.plan, outputs, ctx.starts, grad) if ctx.needs_input_grad[2] else None
        grads: Sequence[Tensor | None] = [None] * len(outputs)
        if any(ctx.needs_input_grad[3:]):
            grads = gather(ctx.plan, [rows], [0] * len(outputs), ctx.starts, stops, grad)
        return None, None, row_grad, *grads

    @staticmethod
    def jvp(ctx, _plan, _starts, row_tangent, *tangents):
        rows, *outputs = ctx.saved_tensors
        terms = []
        if row_tangent is not None:
            terms.append(row_dots(row_tangent, outputs, ctx.starts, ctx.plan))
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
        if moving:
            others, starts = [tangents[i] for i in moving], [ctx.starts[i] for i in moving]
            terms.append(row_dots(rows, others, starts, ctx.plan))
        return _sum(terms)


def _sum(terms: Sequence[Tensor]) -> Tensor | None:
    return sum(terms[1:], terms[0]) if terms else None


def _recorded(tensors: Sequence[Tensor], other: Tensor | None) -> bool:
    if follows_forward() or torch._C._are_functorch_transforms_active():
        return True
    if not torch.is_grad_enabled():
        return False
    if other is not None and other.requires_grad:
        return True
    return any(tensor.requires_grad for tensor in tensors)


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
