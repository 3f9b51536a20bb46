"""The functional floor for the squeeze-and-excite addition: validated once, one autograd node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .autograd import once_differentiable
from .ops.reference import empty_maps

Excite = Callable[[Tensor], Tensor]

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def se_add(
    main: Tensor,
    aux: Tensor,
    excite_main: Excite,
    excite_aux: Excite,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """Adds two feature maps, each channel of each sample scaled by what its means excite.

    out[i] = s_i * main[i] + t_i * aux[i] with s = excite_main(means of main), t likewise, for the
    samples i < n that aux has; out[i] = main[i] behind them. Maps in memory format channels last
    stay so. Sums and products of fp16, bf16 and fp32 are taken in fp32.

    Args:
        main: [N, C, ...], floating.
        aux: [n, C, ...], n <= N, else like main.
        excite_main, excite_aux: channel means [n, C] -> scales [n, C]; small networks, computed by
            torch. Where a graph is recorded they are differentiated through the same node.
        parameters: the tensors, besides their argument, to which they pass a gradient.

    Raises:
        TypeError: not floating tensors of one dtype.
        ValueError: shapes that do not fit.
        RuntimeError: a second derivative is asked for; none is offered.
    """
    _check_maps(main, aux)
    if main.dtype != aux.dtype:  # under autocast
        wide = torch.promote_types(main.dtype, aux.dtype)
        main, aux = main.to(wide), aux.to(wide)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (main, aux, *parameters)):
        return _SEAdd.apply(excite_main, excite_aux, main, aux, *parameters)
    kernels = ops.kernels()
    scales = [
        _scales(excite, kernels.se_add_means(maps), maps)
        for excite, maps in ((excite_main, main[: aux.shape[0]]), (excite_aux, aux))
    ]
    return kernels.se_add(main, aux, *scales)


class _SEAdd(torch.autograd.Function):
    """Both excitations run inside, with a graph of their own on [n, C]: a backward then needs one
    pass over the maps for the gradients of the scales, and one for those of the maps."""

    @staticmethod
    def forward(ctx, excite_main, excite_aux, main, aux, *parameters):
        kernels, head = ops.kernels(), main[: aux.shape[0]]
        ctx.means = [kernels.se_add_means(maps).requires_grad_() for maps in (head, aux)]
        # Hooks such as those of checkpointing are for what the outer graph keeps.
        plain = torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged)
        with torch.enable_grad(), plain:
            ctx.scales = [
                _scales(excite, means, main)
                for excite, means in zip((excite_main, excite_aux), ctx.means, strict=True)
            ]
        ctx.save_for_backward(main, aux, *parameters)
        return kernels.se_add(main, aux, *(scales.detach() for scales in ctx.scales))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        main, aux, *parameters = ctx.saved_tensors
        kernels = ops.kernels()
        head, grad = main[: aux.shape[0]], _laid_out_as(main, grad)
        dots = kernels.se_add_dots(grad, head, aux)
        wanted = [p for p, need in zip(parameters, ctx.needs_input_grad[4:], strict=True) if need]
        live = [i for i in (0, 1) if ctx.scales[i].requires_grad]
        grads: Sequence[Tensor | None] = [None] * (2 + len(wanted))
        if live:
            grads = torch.autograd.grad(
                [ctx.scales[i] for i in live],
                [*ctx.means, *wanted],
                [dots[i] for i in live],
                retain_graph=True,
                allow_unused=True,
            )
        of_main = of_aux = None
        if any(ctx.needs_input_grad[2:4]):
            shifts = [
                torch.zeros_like(means)
                if of is None
                else of * (means.numel() / max(1, maps.numel()))
                for means, of, maps in zip(ctx.means, grads[:2], (head, aux), strict=True)
            ]
            scales = [scales.detach() for scales in ctx.scales]
            of_main, of_aux = kernels.se_add_grads(grad, *scales, *shifts)
        given = iter(grads[2:])
        of_parameters = [next(given) if need else None for need in ctx.needs_input_grad[4:]]
        return None, None, of_main, of_aux, *of_parameters


def _laid_out_as(main: Tensor, grad: Tensor) -> Tensor:
    """`grad`, copied where it lies otherwise in memory than `main`: gradients follow its layout."""
    if grad.stride()[1:] == empty_maps(main, 0).stride()[1:]:
        return grad
    return empty_maps(main, main.shape[0]).copy_(grad)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _scales(excite: Excite, means: Tensor, maps: Tensor) -> Tensor:
    """[n, C] in the dtype of `means`; the network computes in that of the maps."""
    scales = excite(means.to(maps.dtype))
    if scales.shape != means.shape:
        raise ValueError(
            f"se_add: an excitation must return the shape of the channel means, "
            f"{list(means.shape)}; got {list(scales.shape)}"
        )
    return scales.to(means.dtype)


def _check_maps(main: Any, aux: Any) -> None:
    for name, maps in (("main", main), ("aux", aux)):
        if not isinstance(maps, Tensor) or maps.dtype not in _FLOATING:
            got = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
            raise TypeError(f"se_add: {name} must be a floating tensor [N, C, ...]; got {got}")
    if main.ndim < 2 or aux.shape[1:] != main.shape[1:] or aux.shape[0] > main.shape[0]:
        raise ValueError(
            "se_add: wanted main [N, C, ...] and aux [n, C, ...] of the same channels and size, "
            f"with n <= N; got {list(main.shape)} and {list(aux.shape)}"
        )
    if main.dtype != aux.dtype and not torch.is_autocast_enabled(main.device.type):
        raise TypeError(f"se_add: main and aux must have one dtype; got {main.dtype}, {aux.dtype}")
    if main.device != aux.device:
        raise ValueError(
            f"se_add: main and aux must be on one device; got {main.device} and {aux.device}"
        )
