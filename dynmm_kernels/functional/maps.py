"""The functional floor for the squeeze-and-excite addition: validated once, one autograd node."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.reference import empty_maps
from .autograd import follows_forward, on_backend_of_forward
from .deferred import has_values

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
        RuntimeError: a second derivative is asked for, and an excitation answers the same means
            otherwise than before (dropout). Else derivatives of any order are exact; those beyond
            the first, and forward mode, are computed by plain PyTorch.
    """
    _check_maps(main, aux)
    if main.dtype != aux.dtype:  # under autocast
        wide = torch.promote_types(main.dtype, aux.dtype)
        main, aux = main.to(wide), aux.to(wide)
    if follows_forward() or not has_values(main):  # compilers know how to fuse it
        return _plain(main, aux, *_plain_scales(main, aux, excite_main, excite_aux))
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
        ctx.kernels = ops.serving()
        kernels, head = ops.kernels(), main[: aux.shape[0]]
        ctx.excite = excite_main, excite_aux
        ctx.autocast = (
            torch.is_autocast_enabled(main.device.type),
            torch.get_autocast_dtype(main.device.type),
        )
        ctx.means = [kernels.se_add_means(maps).requires_grad_() for maps in (head, aux)]
        # Hooks such as those of checkpointing are for what the outer graph keeps. A tensor that is
        # unpacked as it was packed would keep itself alive.
        plain = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _unchanged)
        with torch.enable_grad(), plain:
            ctx.scales = [
                _scales(excite, means, main)
                for excite, means in zip(ctx.excite, ctx.means, strict=True)
            ]
        ctx.save_for_backward(main, aux, *parameters)
        return kernels.se_add(main, aux, *(scales.detach() for scales in ctx.scales))

    @staticmethod
    @on_backend_of_forward
    def backward(ctx, grad):
        if torch.is_grad_enabled() or follows_forward():
            return None, None, *_plain_grads(ctx, grad)
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


class _Door(torch.autograd.Function):
    """The tensor itself; while the door is closed, no gradient goes through."""

    @staticmethod
    def forward(ctx, tensor, door):
        ctx.door = door
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.door.opened else None, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.view_as(tangent)


class _Doors:
    opened = False


def _plain_grads(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradients of main, aux and the parameters, with a graph of their own.

    main may come from aux or from the parameters, which is for the outer graph to follow.
    """
    doors = _Doors()
    main, aux, *parameters = ctx.saved_tensors
    main, aux = _Door.apply(main, doors), _Door.apply(aux, doors)
    enabled, dtype = ctx.autocast
    with torch.enable_grad(), torch.autocast(main.device.type, dtype=dtype, enabled=enabled):
        scales = _plain_scales(main, aux, *ctx.excite)
        out = _plain(main, aux, *scales)
    for again, before in zip(scales, ctx.scales, strict=True):
        if not torch.allclose(again, before, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise RuntimeError(
                "se_add: a second derivative is not offered where an excitation answers the same "
                "means otherwise than before, as dropout does; use se_add without it"
            )
    wanted = ctx.needs_input_grad[2:]
    needed = [t for t, need in zip((main, aux, *parameters), wanted, strict=True) if need]
    create_graph = torch.is_grad_enabled()
    grads = torch.autograd.grad(out, needed, grad, create_graph=create_graph, allow_unused=True)
    doors.opened = True
    given = iter(grads)
    return [next(given) if need else None for need in wanted]


def _plain_scales(main: Tensor, aux: Tensor, *excite: Excite) -> list[Tensor]:
    streams = (main[: aux.shape[0]], aux)
    return [
        _scales(of, _channel_means(maps), maps) for of, maps in zip(excite, streams, strict=True)
    ]


def _channel_means(maps: Tensor) -> Tensor:
    pixels = maps.reshape(*maps.shape[:2], math.prod(maps.shape[2:]))
    return pixels.to(ops.weight_dtype(maps.dtype)).mean(2)


def _plain(main: Tensor, aux: Tensor, main_scale: Tensor, aux_scale: Tensor) -> Tensor:
    """The op `se_add` in plain PyTorch."""
    head, tail = main.split([aux.shape[0], main.shape[0] - aux.shape[0]])
    shape = (*main_scale.shape, *[1] * (main.ndim - 2))
    fused = main_scale.view(shape) * head + aux_scale.view(shape) * aux
    return torch.cat([fused.to(main.dtype), tail])


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
