"""How a gate learns from rows that only partly carry a graph, and what gets exact zeros.

`CombineSelected` and `FusePrefix` give a hard decision the gradient of its probabilities. In the
forward pass the weight of a chosen row is one and of any other zero; in the backward pass every
row, chosen or not, tells its weight <gradient of the output, row>.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from .autograd import Function, combine, follows_forward, gather, is_followed, on_backend_of_forward

Hidden = Callable[[], Sequence[Tensor]]

_REFUSED = (
    "dynmm_kernels: a second derivative through the gate's straight-through gradient is not "
    "offered: it needs graphs of the branches that were not chosen. Use masked execution or "
    'gate_grad="selected", or detach what needs none'
)


class CombineSelected(Function):
    """Outputs back in sample order; see `movement.combine_selected`."""

    @staticmethod
    def forward(plan, starts, other_starts, index, num_outputs, hidden, probs, *rows):
        return ops.kernels().combine_rows(rows[:num_outputs], starts, plan.inverse, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernels = ops.serving()
        plan, starts, other_starts, index, _, ctx.hidden, probs, *rows = inputs
        ctx.plan, ctx.starts, ctx.all_starts = plan, starts, [*starts, *other_starts]
        ctx.save_for_backward(index, probs, *rows)
        ctx.save_for_forward(index, *rows)

    @staticmethod
    @on_backend_of_forward
    def backward(ctx, grad):
        index, probs, *rows = ctx.saved_tensors
        num_outputs = len(ctx.starts)
        stops = [s + row.shape[0] for s, row in zip(ctx.starts, rows[:num_outputs], strict=True)]
        ranges = [0] * num_outputs, ctx.starts, stops
        if torch.is_grad_enabled() or follows_forward():
            weights = None if ctx.hidden else _ones_of(probs, index, ctx.plan.ranks, grad.dtype)
            dots = _row_dots(grad, rows, ctx.all_starts, index)
            grads = gather(ctx.plan, [grad], *ranges, weights)
            if ctx.hidden:
                hidden = [probs, *ctx.hidden()]
                dots, grads = refuse(dots, hidden), [refuse(own, hidden) for own in grads]
        else:
            dots = ops.kernels().row_dots(grad, rows, ctx.all_starts, index)
            grads = gather(ctx.plan, [grad], *ranges, None)
        none = [None] * (len(rows) - num_outputs)
        return None, None, None, None, None, None, dots.to(probs.dtype), *grads, *none

    @staticmethod
    def jvp(ctx, _plan, _starts, _others, _index, _count, _hidden, probs_tangent, *tangents):
        index, *rows = ctx.saved_tensors
        kernels, own = ops.kernels(), tangents[: len(ctx.starts)]
        weights = probs_tangent.to(ops.weight_dtype(rows[0].dtype))
        if torch._C._are_functorch_transforms_active():
            moved = combine(ctx.plan, own, ctx.starts, None)
            return moved + _combine_rows(rows, ctx.all_starts, index, weights)
        moved = kernels.combine_rows(own, ctx.starts, ctx.plan.inverse, None)
        return moved + kernels.combine_rows(rows, ctx.all_starts, index, weights)


class FusePrefix(Function):
    """Rows one behind the other; see `movement.fuse_prefix`."""

    @staticmethod
    def forward(index, num_parts, hidden, weights, *rows):
        return torch.cat(rows[:num_parts])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kernels = ops.serving()
        index, ctx.num_parts, ctx.hidden, weights, *rows = inputs
        ctx.sizes = [part.shape[0] for part in rows]
        ctx.starts = [0, *itertools.accumulate(ctx.sizes[:-1])]
        ctx.save_for_backward(index, weights, *rows)
        ctx.save_for_forward(index, *rows)

    @staticmethod
    @on_backend_of_forward
    def backward(ctx, grad):
        index, weights, *rows = ctx.saved_tensors
        if torch.is_grad_enabled() or follows_forward():
            dots = _row_dots(grad, rows, ctx.starts, index)
            if ctx.hidden:
                hidden = [weights, *ctx.hidden()]
                dots, grad = refuse(dots, hidden), refuse(grad, hidden)
            else:
                ones = _ones_of(weights, index, 1, grad.dtype).to(grad.dtype)
                grad = grad * ones.view(-1, *[1] * (grad.ndim - 1))
        else:
            dots = ops.kernels().row_dots(grad, rows, ctx.starts, index)
        parts = grad.split(ctx.sizes[: ctx.num_parts])
        none = [None] * (len(rows) - ctx.num_parts)
        return None, None, None, dots.to(weights.dtype), *parts, *none

    @staticmethod
    def jvp(ctx, _index, _count, _hidden, weights_tangent, *tangents):
        index, *rows = ctx.saved_tensors
        result = torch.cat(tangents[: ctx.num_parts])
        scale = weights_tangent.to(ops.weight_dtype(result.dtype))
        if torch._C._are_functorch_transforms_active():
            return result + _combine_rows(rows, ctx.starts, index, scale)
        return result + ops.kernels().combine_rows(rows, ctx.starts, index, scale)


class Touch(Function):
    """The first tensors themselves, and zeros for the gradients of the others.

    They must be nobody else's: they stay what they are, no views, and may be written to. In forward
    mode they are copied.
    """

    @staticmethod
    def forward(num_outputs, sparse, hidden, *tensors):
        outputs = tensors[:num_outputs]
        return tuple(output.clone() for output in outputs) if follows_forward() else outputs

    @staticmethod
    def setup_context(ctx, inputs, output):
        num_outputs, ctx.sparse, ctx.hidden, *tensors = inputs
        ctx.set_materialize_grads(False)
        if not follows_forward():
            ctx.mark_dirty(*tensors[:num_outputs])
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors[num_outputs:]]

    @staticmethod
    def backward(ctx, *grads):
        zeros = []
        for (shape, dtype, device), sparse in zip(ctx.like, ctx.sparse, strict=True):
            if sparse:
                none = torch.empty((1, 0), dtype=torch.int64, device=device)
                values = torch.empty((0, *shape[1:]), dtype=dtype, device=device)
                zeros.append(torch.sparse_coo_tensor(none, values, shape, check_invariants=False))
                continue
            zero = torch.zeros(shape, dtype=dtype, device=device)
            refused = torch.is_grad_enabled() and ctx.hidden
            zeros.append(refuse(zero, ctx.hidden()) if refused else zero)
        return None, None, None, *grads, *zeros

    @staticmethod
    def jvp(ctx, _count, _sparse, _hidden, *tangents):
        return tangents[: len(tangents) - len(ctx.like)]


class _Refuse(Function):
    """Zero, in the graph of tensors with respect to which no derivative is known."""

    @staticmethod
    def forward(*hidden):
        return torch.zeros(())

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(_REFUSED)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(_REFUSED)


def refuse(result: Tensor, hidden: Sequence[Tensor]) -> Tensor:
    """`result`, on which a further derivative with respect to `hidden` raises, on every road."""
    if torch._C._are_functorch_transforms_active():  # hidden may be of a transform that has ended
        hidden = [*map(torch._C._functorch.unwrap_if_dead, hidden)]
    hidden = [tensor for tensor in hidden if is_followed(tensor)]
    return result + _Refuse.apply(*hidden) if hidden else result


def _ones_of(weights: Tensor, index: Tensor, ranks: int, dtype: torch.dtype) -> Tensor:
    """[N, ranks]: ones, with the gradient of the weights [N, B] of chosen rows."""
    ones = torch.where(index >= 0, 1 + weights - weights.detach(), 0)
    if ranks == 1:
        ones = ones.sum(1, keepdim=True)
    return ones.to(ops.weight_dtype(dtype))


def _row_dots(
    rows: Tensor, outputs: Sequence[Tensor], starts: Sequence[int], index: Tensor
) -> Tensor:
    """The op `row_dots` in plain PyTorch, which differentiates it to any order."""
    others = _rows_at(outputs, starts, index).to(torch.promote_types(rows.dtype, torch.float32))
    dots = (rows.to(others.dtype).reshape(len(rows), 1, others.shape[2]) * others.conj()).sum(2)
    return dots.real if dots.is_complex() else dots


def _combine_rows(
    outputs: Sequence[Tensor], starts: Sequence[int], index: Tensor, weights: Tensor
) -> Tensor:
    """The op `combine_rows` likewise."""
    first = outputs[0]
    rows = (weights.unsqueeze(2) * _rows_at(outputs, starts, index)).sum(1)
    return rows.reshape(-1, *first.shape[1:]).to(first.dtype)


def _rows_at(outputs: Sequence[Tensor], starts: Sequence[int], index: Tensor) -> Tensor:
    """[N, M, numel]: the rows in the slots [N, M], zeros where there is none."""
    place, count, numel = torch.full_like(index, -1), 0, math.prod(outputs[0].shape[1:])
    for start, output in zip(starts, outputs, strict=True):
        held = (index >= start) & (index < start + output.shape[0])
        place = torch.where(held, index - start + count, place)
        count += output.shape[0]
    rows = torch.cat([*outputs]).index_select(0, place.clamp(min=0).flatten())
    return torch.where((place >= 0).unsqueeze(2), rows.reshape(*index.shape, numel), 0)
