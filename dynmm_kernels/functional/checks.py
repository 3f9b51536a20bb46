"""What route, gather and combine accept, and the errors that say what came and what was wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import ops
from . import tree
from .deferred import has_values
from .plan import RoutingPlan

_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_FLOATING = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_STRIDED = torch.strided
MAX_ENTRIES = 2**31 - 1  # slots are int32
MAX_BRANCHES = 2**20


def check_selection(selection: Any, num_branches: Any) -> None:
    """Raises TypeError or ValueError unless `route` can take it; values are checked as it runs."""
    if not isinstance(selection, Tensor):
        raise TypeError(f"route: selection must be a tensor; got {type(selection).__name__}")
    if isinstance(num_branches, bool) or not hasattr(num_branches, "__index__"):
        raise TypeError(
            f"route: num_branches must be an integer; got {type(num_branches).__name__}"
        )
    if not 1 <= num_branches <= MAX_BRANCHES:
        raise ValueError(f"route: num_branches must be in 1..{MAX_BRANCHES}; got {num_branches}")
    shape = list(selection.shape)
    if selection.dtype == torch.bool:
        flat = len(shape) == 1 and num_branches == 1
        if not flat and (len(shape) != 2 or shape[1] != num_branches):
            raise ValueError(
                f"route: a bool mask must have shape [N, num_branches] = [N, {num_branches}]; "
                f"got {shape}"
            )
    elif selection.dtype not in _SIGNED + UNSIGNED:
        raise TypeError(
            f"route: selection must be integer (branch indices) or bool (a mask); got "
            f"{selection.dtype}. For logits, route their argmax(dim=1)"
        )
    elif len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] == 0):
        raise ValueError(f"route: selection must have shape [N] or [N, k>=1]; got {shape}")
    check_entries(selection.numel())


def check_entries(count: int) -> None:
    """Raises ValueError unless so many (row, rank) have slots, which are int32."""
    if count >= MAX_ENTRIES:
        raise ValueError(
            f"route: at most 2**31 - 2 entries (rows times ranks, for multi_hot and the exact "
            f"gradient of the gate rows times branches); got {count}; split the batch"
        )


def check_logits(
    logits: Any,
    num_rows: int | None,
    num_branches: int,
    device: torch.device | None,
    gate: str = "the gate",
) -> None:
    """Raises TypeError or ValueError unless `logits` is a floating [N, B] on `device`.

    None stands for any N, and for any device.
    """
    floating = isinstance(logits, Tensor) and logits.dtype in _FLOATING
    if floating:
        shape = logits.shape
        if len(shape) == 2 and shape[1] == num_branches and num_rows in (None, shape[0]):
            if device is not None and logits.device != device:
                raise ValueError(
                    f"{gate} must return logits on {device}, as its inputs are; got {logits.device}"
                )
            if logits.layout is not _STRIDED:
                raise TypeError(f"{gate} must return strided logits; got {logits.layout}")
            return
    wanted = f"[{'N' if num_rows is None else num_rows}, {num_branches}]"
    if floating:
        raise ValueError(
            f"{gate} must return logits of shape {wanted}, one column per branch; got "
            f"{list(logits.shape)}"
        )
    got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
    raise TypeError(f"{gate} must return floating logits {wanted}; got {got}")


def check_choice(selection: Tensor, plan: RoutingPlan) -> None:
    """Raises ValueError for the first value of a routed `selection` that names no branch."""
    count, first = plan.faults
    if count:
        raise ValueError(
            f"route: a choice must be in 0..{plan.num_branches - 1}, or -1 for no branch; got "
            f"{selection.flatten()[first].tolist()} in row {first // plan.ranks} ({count} such in "
            "all)"
        )


LOGITS = "logits must have a finite maximum and no nan"


def check_faults(
    logits: Tensor,
    plan: RoutingPlan,
    gate: str = "the gate",
    samples: Tensor | None = None,
    wanted: str = LOGITS,
) -> None:
    """Raises ValueError for the first undefined row of what a gate returned.

    Args:
        plan: whose faulty entries are those of such rows.
        samples: samples[row] is the row of the batch that `logits` are for; None: the same.
        wanted: of what the gate returns.
    """
    if not has_values(logits):
        return
    count, first = plan.faults
    if count:
        row = first // plan.ranks
        sample = row if samples is None else int(samples[row])
        _raise_undefined(logits, row, count // plan.ranks, gate, sample, wanted)


def check_defined(
    logits: Tensor, undefined: Tensor, gate: str = "the gate", wanted: str = LOGITS
) -> None:
    """As `check_faults`, of rows bool [N] that are `undefined`; where nobody makes a plan."""
    if has_values(logits) and undefined.any():
        row = int(undefined.int().argmax())
        _raise_undefined(logits, row, int(undefined.sum()), gate, row, wanted)


def _raise_undefined(
    logits: Tensor, row: int, count: int, gate: str, sample: int, wanted: str
) -> NoReturn:
    raise ValueError(
        f"{gate}'s {wanted}; got {logits[row].tolist()} in row {sample} ({count} such rows in all)"
    )


def check_source(leaf: Any, plan: RoutingPlan) -> None:
    """Raises TypeError or ValueError unless `leaf` is a tensor on the device of the plan."""
    if not isinstance(leaf, Tensor):
        raise TypeError("gather: Lazy inputs are for RoutedFusion; fetch plan.rows(branch) here")
    if leaf.device != plan.order.device:
        raise ValueError(f"gather: the plan is on {plan.order.device}, a tensor on {leaf.device}")


def single_tensors_fit(outputs: Sequence[Any], rows: Sequence[int], device: torch.device) -> bool:
    """The common case of `check_outputs`, answered without building anything."""
    dtype = inner = None
    for output, count in zip(outputs, rows):  # noqa: B905 (strict costs as much as the check)
        if type(output) is not Tensor or output.layout is not _STRIDED:
            return False
        length, *rest = output.shape or (-1,)
        if length != count or output.device != device:
            return False
        if inner is None:
            dtype, inner = output.dtype, rest
        elif rest != inner or output.dtype is not dtype:
            return False
    return True


def check_outputs(
    outputs: Sequence[Any],
    rows: Sequence[int],
    names: Sequence[str],
    device: torch.device,
    losses: bool = True,
    widths: bool = False,
) -> tuple[list[tuple[Any, ...]], tree.Spec]:
    """The leaves of all outputs, one column per leaf, after checking that they fit together.

    Args:
        rows: how many each must have.
        names: what messages call the branches.
        device: where they must be: that of the plan.
        losses: whether there may be auxiliary ones, 0-dim tensors beside those with rows.
        widths: whether they may differ in dim 1, which they must have then.

    Raises:
        ValueError: another structure, shape, number of rows or device. TypeError: another dtype, or
            tensors that are not strided.
    """
    _, spec = tree.flatten(outputs[0])
    flat = []
    for name, output in zip(names, outputs, strict=True):
        leaves = tree.flatten_as(spec, output)
        if leaves is None:
            raise ValueError(
                f"{name} returns another structure than {names[0]}: {_describe(output)} against "
                f"{_describe(outputs[0])}"
            )
        flat.append(leaves)
    columns = list(zip(*flat, strict=True))
    for position, column in enumerate(columns):
        first = column[0]
        if losses and tree.is_scalar(first) and _are_losses(column, flat[0]):
            continue
        for name, leaf, count in zip(names, column, rows, strict=True):
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                if (isinstance(first, Tensor) and first.ndim > 0) or isinstance(leaf, Tensor):
                    lone = losses and tree.is_scalar(leaf) and _are_losses([leaf], flat[0])
                    raise ValueError(
                        f"{name}: output {position} must be a tensor of shape [{count}, "
                        f"...], one row per sample; got {_describe(leaf)}"
                        + ", which is a loss only where every branch returns one"
                        * lone
                    )
                continue
            if leaf.layout is not torch.strided:
                raise TypeError(f"{name}: output {position} must be strided; got {leaf.layout}")
            if leaf.device != device:
                raise ValueError(
                    f"{name}: output {position} is on {leaf.device}; it must be on {device}, as "
                    "the decision and the inputs are"
                )
            if leaf.shape[0] != count:
                raise ValueError(
                    f"{name}: output {position} must have {count} rows, one per sample it "
                    f"received; got shape {list(leaf.shape)}"
                )
            if widths and leaf.ndim < 2:
                raise ValueError(
                    f"{name}: output {position} must have a dimension 1 to concatenate along; got "
                    f"shape {list(leaf.shape)}"
                )
            if leaf.shape[1 + widths :] != first.shape[1 + widths :]:
                raise ValueError(
                    f"{name}: output {position} has rows of shape {list(leaf.shape[1:])}, "
                    f"those of {names[0]} have {list(first.shape[1:])}; they must be equal"
                    + ", but for dimension 1"
                    * widths
                )
            if leaf.dtype != first.dtype and not torch.is_autocast_enabled(leaf.device.type):
                raise TypeError(
                    f"{name}: output {position} is {leaf.dtype}, that of "
                    f"{names[0]} is {first.dtype}; branches must agree on the dtype"
                )
    return columns, spec


def _are_losses(column: Sequence[Any], leaves: Sequence[Any]) -> bool:
    """Whether a leaf of every branch is a loss; `leaves`: all of the first branch."""
    beside = any(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves)
    return beside and all(map(tree.is_scalar, column))


def check_weights(weights: Tensor, plan: RoutingPlan, dtype: torch.dtype) -> Tensor:
    """`weights` of outputs of `dtype` as [N, k] in the type that they are summed in."""
    if weights.device != plan.order.device:
        raise ValueError(
            f"combine: the plan is on {plan.order.device}, the weights are on {weights.device}"
        )
    if not weights.is_floating_point():
        raise TypeError(f"combine: weights must be floating; got {weights.dtype}")
    if not dtype.is_floating_point and not dtype.is_complex:
        raise TypeError(f"combine: outputs of {dtype} cannot be weighted; return floating tensors")
    wanted = (plan.num_rows, plan.ranks)
    if weights.ndim == 1 and plan.ranks == 1:
        weights = weights.unsqueeze(1)
    if tuple(weights.shape) != wanted:
        raise ValueError(
            f"combine: weights must have shape [N, k] = {list(wanted)}; got {list(weights.shape)}"
        )
    return weights.to(ops.weight_dtype(dtype))


def _describe(tree: Any) -> str:
    """Its structure, and the shapes of its tensors."""
    if isinstance(tree, Tensor):
        return f"tensor{list(tree.shape)}"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key!r}: {_describe(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, (list, tuple)):
        inner = ", ".join(map(_describe, tree))
        return f"[{inner}]" if isinstance(tree, list) else f"({inner})"
    return "None" if tree is None else type(tree).__name__
