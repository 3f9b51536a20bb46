"""What counts as equal, and how a difference is told."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 2e-4,
    torch.complex64: 2e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 2e-1,
}


class Mismatch(Exception):
    """The library and the oracle disagree."""


class Skip(Exception):
    """The case has no one right answer, such as a choice between equal logits."""


class Refused(Exception):
    """The library refuses the case, as its documentation says it may."""


def require(condition: bool, what: str, got: Any, wanted: Any) -> None:
    if not condition:
        raise Mismatch(f"{what}: got {got}, wanted {wanted}")


def same(what: str, got: Any, wanted: Tensor, tolerance: float | None = None) -> None:
    """Shape, dtype, and values to rounding relative to the largest value."""
    require(isinstance(got, Tensor), what, type(got).__name__, "a tensor")
    require(got.shape == wanted.shape, f"{what}, shape", got.shape, wanted.shape)
    require(got.dtype == wanted.dtype, f"{what}, dtype", got.dtype, wanted.dtype)
    close(what, got, wanted, tolerance)


def close(what: str, got: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    got, wanted = got.detach(), wanted.detach()
    if got.numel() == 0:
        return
    if not (wanted.is_floating_point() or wanted.is_complex()):
        require(torch.equal(got, wanted), what, got.tolist(), wanted.tolist())
        return
    tolerance = TOLERANCE[wanted.dtype] if tolerance is None else tolerance
    scale = 1.0 + wanted.abs().max().item()
    error = (got - wanted).abs().max().item()
    if not error <= tolerance * scale:
        raise Mismatch(f"{what}: off by {error:.3g} where values reach {scale - 1:.3g}")


def same_gradients(
    what: str,
    names: Sequence[str],
    got: Sequence[Tensor | None],
    wanted: Sequence[Tensor | None],
    tolerance: float | None = None,
    none_is_zero: bool = False,
) -> None:
    """A gradient that the oracle has must not be None; where the oracle has none, zeros will do."""
    for name, mine, right in zip(names, got, wanted, strict=True):
        where = f"{what} of {name}"
        if right is None:
            zero = mine is None or not mine.to_dense().any()
            require(zero, where, mine, "None, or zeros")
        elif mine is None:
            fine = none_is_zero and not right.any()
            require(fine, where, None, "zeros" if not right.any() else "a gradient")
        else:
            close(where, mine.to_dense(), right.to_dense(), tolerance)


@contextlib.contextmanager
def same_statistics(norms: Sequence[nn.Module]) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Around the library's run; gives a function that runs the oracle and compares buffers."""

    def snapshot() -> list[dict[str, Tensor]]:
        return [{name: part.clone() for name, part in norm.named_buffers()} for norm in norms]

    before = snapshot()

    def restore_and_run(oracle: Callable[[], Any]) -> Any:
        after = snapshot()
        for norm, values in zip(norms, before, strict=True):
            norm._buffers.update(values)
        result = oracle()
        for norm, values in zip(norms, after, strict=True):
            for name, value in values.items():
                same(name, value, norm.get_buffer(name))
        return result

    yield restore_and_run


@contextlib.contextmanager
def may_refuse(*kinds: type[BaseException], naming: str = "") -> Iterator[None]:
    """Turns an error that the documentation announces into `Refused`."""
    try:
        yield
    except kinds as error:
        if naming in str(error):
            raise Refused(f"{type(error).__name__}: {error}") from error
        raise


def take_gradients(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Their .grad, which is then cleared."""
    grads = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return grads


ROADS = ("grad", "backward", "backward to inputs")


def second_derivatives(
    road: str, loss: Tensor, tensors: Sequence[Tensor]
) -> list[Tensor | None] | None:
    """Of the squared norm of the gradient; None where that has no graph."""
    first = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    penalty = sum(
        (grad.square().sum() for grad in first if grad is not None and grad.requires_grad),
        torch.zeros((), dtype=loss.dtype),
    )
    if not penalty.requires_grad:
        return None
    if road == "grad":
        return list(torch.autograd.grad(penalty, tensors, allow_unused=True))
    penalty.backward(inputs=list(tensors) if road == "backward to inputs" else None)
    return take_gradients(tensors)


def tangents(function: Callable[[Tensor], list[Tensor]], point: Tensor, along: Tensor):
    """Forward-mode derivatives of the function's outputs, zeros where they have none."""
    with torch.autograd.forward_ad.dual_level():
        outputs = function(torch.autograd.forward_ad.make_dual(point, along))
        pairs = [torch.autograd.forward_ad.unpack_dual(output) for output in outputs]
        return [
            torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent
            for pair in pairs
        ]
