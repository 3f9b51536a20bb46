"""The functional floor: route, gather, combine. Validation happens here, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, ops, tree
from .plan import RoutingPlan

_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_FLOATING = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_LIMIT = 2**31 - 1


def route(selection: Tensor, num_branches: int) -> RoutingPlan:
    """Sorts samples by the branch they chose.

    Args:
        selection: integer [N] or [N, k], each value a branch in 0..B-1 or -1 for no branch; or
            bool [N, B], True where the sample takes the branch.
        num_branches: B.

    Raises:
        TypeError: `selection` is neither integer nor bool.
        ValueError: wrong shape, or a value outside -1..B-1 (on a GPU it is raised when the counts
            are first read).
    """
    given = selection
    plain = type(selection) is Tensor and selection.ndim == 1 and selection.dtype is torch.int64
    if not plain or num_branches < 1 or selection.shape[0] >= _LIMIT:
        _check_selection(selection, num_branches)
        if selection.dtype in _UNSIGNED:
            # A value past int64 wraps to a negative one: out of range, but never "no branch".
            wide = selection.long()
            selection = torch.where(wide < 0, num_branches, wide)
    order, inverse, header = ops.backends.serving.route(selection, num_branches)
    if not selection.is_cpu:
        return RoutingPlan(order, inverse, header, num_branches, unchecked=given)
    plan = RoutingPlan(order, inverse, header, num_branches, header.tolist())
    if plan.host_header[-2]:
        plan.check(given)
    return plan


def _check_selection(selection: Any, num_branches: int) -> None:
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
    elif selection.dtype not in _SIGNED + _UNSIGNED:
        raise TypeError(
            f"route: selection must be integer (branch indices) or bool (a mask); got "
            f"{selection.dtype}. For logits, route their argmax(dim=1)"
        )
    elif len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] == 0):
        raise ValueError(f"route: selection must have shape [N] or [N, k>=1]; got {shape}")
    if selection.numel() >= _LIMIT:
        raise ValueError(f"route: at most 2**31 - 2 entries (N*k); got {selection.numel()}")


def route_argmax(logits: Tensor) -> tuple[Tensor, RoutingPlan]:
    """Sorts samples by their largest logit (ties: the first branch), in one pass.

    Args:
        logits: floating [N, B].

    Returns:
        choice int64 [N], and the plan. Rows whose softmax is undefined (a nan, or no finite
        maximum) count as `plan.faults` and choose -1.
    """
    choice, order, inverse, header = ops.backends.serving.route_argmax(logits)
    return choice, RoutingPlan(order, inverse, header, logits.shape[1])


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


def route_unless(selection: Tensor, undefined: Tensor, num_branches: int) -> RoutingPlan:
    """The plan of an integer selection [N, k]; all of a row that is `undefined` [N, 1] is faulty.

    The faults are left to `check_faults`.
    """
    selection = torch.where(undefined, -2, selection)
    order, inverse, header = ops.kernels().route(selection, num_branches)
    return RoutingPlan(order, inverse, header, num_branches)


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


def route_complement(plan: RoutingPlan, selected: Tensor) -> RoutingPlan:
    """The plan of all (sample, branch) that were not chosen, k = B.

    Its offsets follow from those of `plan`, so the host knows them without another copy.

    Args:
        plan: a plan in which no sample has a branch twice.
        selected: bool [N, B], what `plan` routes.
    """
    order, inverse, header = ops.kernels().route(~selected, plan.num_branches)
    starts = [b * plan.num_rows - start for b, start in enumerate(plan.starts)]
    return RoutingPlan(order, inverse, header, plan.num_branches, [*starts, 0, -1])


def gather(plan: RoutingPlan, tensors: Any) -> list[Any]:
    """Each branch's own rows.

    Args:
        plan: from `route`.
        tensors: a tensor [N, ...] or a pytree of such; None, numbers, 0-dim tensors and
            `Shared` tensors pass through.

    Returns:
        A list over the branches: the same pytree with leaves [n_b, ...]. Memory format is kept.

    Raises:
        ValueError: a tensor's dim 0 is not N, or it is on another device than the plan.
    """
    leaves, spec = tree.flatten(tensors)
    rows, _ = tree.find_rows(leaves, "gather", plan.num_rows)
    for i in rows:
        _check_source(leaves[i], plan)
    branches = range(plan.num_branches)
    sources = [leaves[i] for i in rows]
    index = [i for _ in branches for i in range(len(rows))]
    moved = [b for b in branches for _ in rows]
    gathered = iter(gather_rows(plan, sources, index, moved) if moved else ())
    results = []
    for _ in branches:
        own = [leaf.tensor if isinstance(leaf, tree.Shared) else leaf for leaf in leaves]
        for i in rows:
            own[i] = next(gathered)
        results.append(tree.unflatten(own, spec))
    return results


def combine(plan: RoutingPlan, outputs: Sequence[Any], weights: Tensor | None = None) -> Any:
    """Puts the branches' outputs back in sample order: the transpose of `gather`.

    out[n] = sum_j weights[n, j] * outputs[branch(n, j)][row], summed in rank order in fp32 (fp64
    for fp64), zeros for a sample with no branch.

    Args:
        plan: the plan the rows were gathered with.
        outputs: one pytree per branch, leaves [n_b, ...]; None where the branch has no rows.
        weights: floating [N, k], or [N] where k is 1.

    Raises:
        ValueError, TypeError: an output whose structure, row count, shape or dtype differs; the
            message names the branch.
    """
    if len(outputs) != plan.num_branches:
        raise ValueError(
            f"combine: wanted one output per branch, {plan.num_branches}; got {len(outputs)}"
        )
    active = [b for b, n in enumerate(plan.counts) if n or outputs[b] is not None]
    if not active:
        raise ValueError("combine: every output is None, so the shape of the result is unknown")
    rows = [plan.counts[b] for b in active]
    columns, spec = check_outputs([outputs[b] for b in active], rows, [str(b) for b in active])
    starts = [plan.starts[b] for b in active]
    combined = [combine_rows(plan, column, starts, weights) for column in columns]
    return tree.unflatten(combined, spec)


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

    Raises:
        ValueError: another structure, shape or number of rows. TypeError: another dtype.
    """
    flat = [tree.flatten(output) for output in outputs]
    spec = flat[0][1]
    for name, (leaves, other) in zip(names, flat, strict=True):
        if other != spec or len(leaves) != len(flat[0][0]):
            raise ValueError(
                f"branch {name} returns another structure than branch {names[0]}: "
                f"{_describe(leaves)} against {_describe(flat[0][0])}"
            )
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    for position, column in enumerate(columns):
        first = column[0]
        for name, leaf, count in zip(names, column, rows, strict=True):
            if not isinstance(leaf, Tensor) or leaf.ndim == 0:
                if (isinstance(first, Tensor) and first.ndim > 0) or isinstance(leaf, Tensor):
                    raise ValueError(
                        f"branch {name}: output {position} must be a tensor of shape [{count}, "
                        f"...], one row per sample; got {_describe([leaf])}"
                    )
                continue
            if leaf.shape[0] != count:
                raise ValueError(
                    f"branch {name}: output {position} must have {count} rows, one per sample it "
                    f"received; got shape {list(leaf.shape)}"
                )
            if leaf.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"branch {name}: output {position} has rows of shape {list(leaf.shape[1:])}, "
                    f"those of branch {names[0]} have {list(first.shape[1:])}; they must be equal"
                )
            if leaf.dtype != first.dtype and not torch.is_autocast_enabled(leaf.device.type):
                raise TypeError(
                    f"branch {name}: output {position} is {leaf.dtype}, that of branch "
                    f"{names[0]} is {first.dtype}; branches must agree on the dtype"
                )
    return columns, spec


def gather_rows(
    plan: RoutingPlan,
    sources: list[Tensor],
    index: Sequence[int],
    branches: Sequence[int],
    weights: Tensor | None = None,
) -> list[Tensor]:
    """For each i: the rows of sources[index[i]] that go to branches[i]; all in one call."""
    starts = plan.host_header
    begin = [starts[b] for b in branches]
    end = [starts[b + 1] for b in branches]
    return autograd.gather(plan, sources, index, begin, end, weights)


def combine_rows(
    plan: RoutingPlan, outputs: Sequence[Any], starts: list[int], weights: Tensor | None = None
) -> Any:
    """One leaf of every active branch, back in sample order."""
    first = outputs[0]
    if not isinstance(first, Tensor):
        return first
    outputs = _same_dtype(outputs)
    if weights is None and plan.ranks == 1:
        return autograd.combine(plan, outputs, starts, None)
    if first.dtype == torch.bool:
        raise TypeError("combine: bool outputs cannot be summed; return them as integers")
    if weights is not None:
        weights = _check_weights(weights, plan, first.dtype)
    return autograd.combine(plan, outputs, starts, weights)


def combine_selected(
    plan: RoutingPlan,
    outputs: Sequence[Any],
    starts: list[int],
    probs: Tensor,
    others: Sequence[Any],
    other_starts: list[int],
    index: Tensor,
) -> Any:
    """combine_rows without weights, which also sends the gate its straight-through gradient.

    d loss / d probs[n, m] = <d loss / d out[n], row(index[n, m])>, where the rows are those of
    `outputs` and then those of `others`, at the slots `starts` and `other_starts`; -1: no row, no
    gradient. The rows themselves get no gradient on this way: in the forward pass the weight of a
    selected branch is one, of any other zero.
    """
    first = outputs[0]
    if not isinstance(first, Tensor):
        return first
    if not first.is_floating_point() and not first.is_complex():
        return combine_rows(plan, outputs, starts)
    outputs = _same_dtype(outputs)
    others = [other.to(outputs[0].dtype) for other in others]
    return autograd.CombineSelected.apply(
        plan, starts, other_starts, index, len(outputs), probs, *outputs, *others
    )


def touch(output: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """`output`, with `tensors` in its graph: they receive gradients of exactly zero, not None."""
    return autograd.Touch.apply(output, *tensors)


def route_flat(logits: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """`route_argmax` as order, inverse and the header on the host, without faults."""
    _, order, inverse, header = ops.backends.serving.route_argmax(logits)
    header = header.tolist()
    if header[-2]:
        check_faults(logits, header)
    return order, inverse, header


def gather_flat(
    order: Tensor, tensors: Sequence[Tensor], starts: list[int], stops: list[int]
) -> list[Sequence[Tensor]]:
    """For each range of slots of a top-1 order: its rows of every tensor. Records no graph."""
    size = len(tensors)
    gather = ops.backends.serving.gather_rows
    if size == 1:
        return [(rows,) for rows in gather([*tensors] * len(starts), starts, stops, order, 1)]
    starts = [start for start in starts for _ in range(size)]
    stops = [stop for stop in stops for _ in range(size)]
    rows = gather([*tensors] * (len(starts) // size), starts, stops, order, 1)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def combine_flat(inverse: Tensor, outputs: Sequence[Any], starts: list[int]) -> Any:
    """Tensors of one dtype, by slots of a top-1 plan, in sample order. Records no graph."""
    return ops.backends.serving.combine_rows(outputs, starts, inverse)


def widest_dtype(outputs: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds all: under autocast branches may end in different ones."""
    dtype = outputs[0].dtype
    for output in outputs:
        if output.dtype is not dtype:
            dtype = torch.promote_types(dtype, output.dtype)
    return dtype


def _same_dtype(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    dtype = widest_dtype(outputs)
    if all(output.dtype is dtype for output in outputs):
        return outputs
    return [output.to(dtype) for output in outputs]


def _check_source(leaf: Any, plan: RoutingPlan) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError("gather: Lazy inputs are for RoutedFusion; fetch plan.rows(branch) here")
    if leaf.device != plan.order.device:
        raise ValueError(f"gather: the plan is on {plan.order.device}, a tensor on {leaf.device}")


def _check_weights(weights: Tensor, plan: RoutingPlan, dtype: torch.dtype) -> Tensor:
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
