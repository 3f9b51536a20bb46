"""What route, gather and combine accept, and the errors that say what came and what was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, tree
from .plan import RoutingPlan

_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_FLOATING = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
MAX_ENTRIES = 2**31 - 1


def check_selection(selection: Any, num_branches: int) -> None:
    """Raises TypeError or ValueError unless `route` can take it; values are checked as it runs."""
    if not isinstance(selection, Tensor):
        raise TypeError(f"route: selection must be a tensor; got {type(selection).__name__}")
    if num_branches < 1:
        raise ValueError(f"route: num_branches must be at least 1; got {num_branches}")
    shape = list(selection.shape)
    if selection.dtype == torch.bool:
        if len(shape) != 2 or shape[1] != num_branches:
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
    if selection.numel() >= MAX_ENTRIES:
        raise ValueError(f"route: at most 2**31 - 2 entries (N*k); got {selection.numel()}")


def check_logits(
    logits: Any, num_rows: int | None, num_branches: int, gate: str = "the gate"
) -> None:
    """Raises TypeError or ValueError unless `logits` is a floating [N, B] (N: any where None)."""
    floating = isinstance(logits, Tensor) and logits.dtype in _FLOATING
    if floating:
        shape = logits.shape
        if len(shape) == 2 and shape[1] == num_branches and num_rows in (None, shape[0]):
            return
    wanted = f"[{'N' if num_rows is None else num_rows}, {num_branches}]"
    if floating:
        raise ValueError(
            f"{gate} must return logits of shape {wanted}, one column per branch; got "
            f"{list(logits.shape)}"
        )
    got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
    raise TypeError(f"{gate} must return floating logits {wanted}; got {got}")


def check_faults(
    logits: Tensor,
    header: list[int],
    gate: str = "the gate",
    samples: Tensor | None = None,
    entries_per_row: int = 1,
) -> None:
    """Raises ValueError for the first row of `logits` without a defined softmax.

    `samples[row]` is the row of the batch that the logits are for; None: the same.
    """
    faults, row = header[-2] // entries_per_row, header[-1] // entries_per_row
    if faults:
        sample = row if samples is None else int(samples[row])
        raise ValueError(
            f"{gate}'s logits must have a finite maximum and no nan; got "
            f"{logits[row].tolist()} in row {sample} ({faults} such rows in all)"
        )


def check_source(leaf: Any, plan: RoutingPlan) -> None:
    """Raises TypeError or ValueError unless `leaf` is a tensor on the device of the plan."""
    if not isinstance(leaf, Tensor):
        raise TypeError("gather: Lazy inputs are for RoutedFusion; fetch plan.rows(branch) here")
    if leaf.device != plan.order.device:
        raise ValueError(f"gather: the plan is on {plan.order.device}, a tensor on {leaf.device}")


def single_tensors_fit(outputs: Sequence[Any], rows: Sequence[int]) -> bool:
    """The common case of `check_outputs`, answered without building anything."""
    dtype = inner = None
    for output, count in zip(outputs, rows):  # noqa: B905 (strict costs as much as the check)
        if type(output) is not Tensor:
            return False
        length, *rest = output.shape or (-1,)
        if length != count:
            return False
        if inner is None:
            dtype, inner = output.dtype, rest
        elif rest != inner or output.dtype is not dtype:
            return False
    return True


def check_outputs(
    outputs: Sequence[Any], rows: Sequence[int], names: Sequence[str]
) -> tuple[list[tuple[Any, ...]], tree.Spec]:
    """The leaves of all outputs, one column per leaf, after checking that they fit together.

    `names`: what messages call the branches.

    Raises:
        ValueError: another structure, shape or number of rows. TypeError: another dtype.
    """
    flat = [tree.flatten(output) for output in outputs]
    spec = flat[0][1]
    for name, (leaves, other) in zip(names, flat, strict=True):
        if other != spec or len(leaves) != len(flat[0][0]):
            raise ValueError(
                f"{name} returns another structure than {names[0]}: "
                f"{_describe(leaves)} against {_describe(flat[0][0])}"
            )
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    for position, column in enumerate(columns):
        first = column[0]
        for name, leaf, count in zip(names, column, rows, strict=True):
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                if (isinstance(first, Tensor) and first.ndim > 0) or isinstance(leaf, Tensor):
                    raise ValueError(
                        f"{name}: output {position} must be a tensor of shape [{count}, "
                        f"...], one row per sample; got {_describe([leaf])}"
                    )
                continue
            if leaf.shape[0] != count:
                raise ValueError(
                    f"{name}: output {position} must have {count} rows, one per sample it "
                    f"received; got shape {list(leaf.shape)}"
                )
            if leaf.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"{name}: output {position} has rows of shape {list(leaf.shape[1:])}, "
                    f"those of {names[0]} have {list(first.shape[1:])}; they must be equal"
                )
            if leaf.dtype != first.dtype and not torch.is_autocast_enabled(leaf.device.type):
                raise TypeError(
                    f"{name}: output {position} is {leaf.dtype}, that of "
                    f"{names[0]} is {first.dtype}; branches must agree on the dtype"
                )
    return columns, spec


def check_weights(weights: Tensor, plan: RoutingPlan, dtype: torch.dtype) -> Tensor:
    """`weights` of outputs of `dtype` as [N, k] in the type that they are summed in."""
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


def _describe(leaves: Sequence[Any]) -> str:
    parts = [
        f"tensor{list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in leaves
    ]
    return f"({', '.join(parts)})"
