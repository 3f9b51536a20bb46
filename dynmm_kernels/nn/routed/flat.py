"""The short way through RoutedFusion for its plainest use.

With branches of a few microseconds the bookkeeping of the general way takes longer than the work.
What it does is the same: route, gather, call, combine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import profiler

from ...functional import autograd, checks, movement, ranges, selecting, sorting, tree
from ..adaptive import FLAT, run_faster
from ..branch import Branch
from ..chooser import Chooser
from ..decision import sum_losses
from ..gates import ask, ask_unnamed
from ..memory import apart


class Steps(NamedTuple):
    """What is called in a row, with ranges in profiles or without looking for a profiler."""

    ask: Callable[..., Any]
    route: Callable[..., Any]
    gather: Callable[..., Any]
    call: Callable[..., Any]
    combine: Callable[..., Any]
    select: Callable[..., Any]


PLAIN = Steps(
    ask_unnamed,
    sorting.route_flat,
    movement.gather_flat,
    Branch.call_unnamed,
    movement.combine_flat,
    selecting.select_sorted,
)
RECORDED = Steps(
    ask,
    ranges.phase("route")(sorting.route_flat),
    ranges.phase("gather")(movement.gather_flat),
    Branch.call,
    ranges.phase("combine")(movement.combine_flat),
    ranges.phase("combine")(selecting.select_sorted),
)
ALONE = "one branch takes the whole batch"


def run_flat(
    gate: Branch, branches: list[Branch], inputs: tuple[Any, ...], chooser: Chooser | None
) -> Any:
    """The fused output, or None where the general way must be taken, before anything ran.

    For eval without a graph, inputs that are plain tensors which the gate and every branch read,
    and branches that treat samples alone. `chooser`: picks routed or masked; None: routed.
    """
    for branch in branches:
        own = branch.__dict__  # past Module.__getattr__, which is slow
        if own["inputs"] is not None or own["norms"] or own["in_place"]:
            return None
    num_rows = _num_rows(inputs)
    if not num_rows or gate.inputs is not None or gate.in_place or autograd.follows_forward():
        return None

    device = inputs[0].device
    steps = RECORDED if profiler._is_profiler_enabled else PLAIN
    logits = steps.ask(gate, inputs, inputs, num_rows, len(branches), device)
    order, inverse, header = steps.route(logits)
    chosen, starts, stops, counts, start = [], [], [], [], 0
    for b, branch in enumerate(branches):
        stop = header[b + 1]
        if start < stop:
            chosen.append(branch)
            starts.append(start)
            stops.append(stop)
            counts.append(stop - start)
            start = stop
    if len(chosen) == 1:
        if chooser is not None:
            chooser.last = ALONE
        output = chosen[0].call_reading(inputs, inputs, range(len(inputs)))
        held = [*inputs, *chosen[0].buffers_held()]
        if checks.single_tensors_fit((output,), counts, device):
            return apart(output, held)
        columns, spec = checks.check_outputs([output], counts, [chosen[0].label], device)
        return tree.unflatten([apart(column[0], held) for column in columns], spec)

    def routed() -> Any:
        return _run_rows(steps, chosen, inputs, (order, inverse), starts, stops, counts)

    if chooser is None:
        return routed()
    if chooser.barred is not None:
        chooser.last = chooser.barred
        return routed()
    every = tuple([header[b + 1] - header[b] for b in range(len(branches))])
    ways = routed, lambda: _run_whole(steps, branches, inputs, inverse, header)
    output = run_faster(chooser, FLAT, num_rows, every, order, ways)
    bar_losses(chooser, output)
    return output


def bar_losses(chooser: Chooser, output: Any) -> None:
    """Routed from now on where there is an auxiliary loss: masked it would be of other rows."""
    if type(output) is not Tensor and tree.holds_scalar(output):
        chooser.barred = "its branches return an auxiliary loss, which is one of their own samples"


def _run_rows(
    steps: Steps,
    chosen: list[Branch],
    inputs: tuple[Any, ...],
    plan: tuple[Tensor, Tensor],
    starts: list[int],
    stops: list[int],
    counts: list[int],
) -> Any:
    """Each branch on its own samples."""
    order, inverse = plan
    rows = steps.gather(order, inputs, starts, stops)
    rows.reverse()
    every = range(len(inputs))
    call = steps.call
    outputs = [call(branch, rows.pop(), every) for branch in chosen]  # rows are freed once used
    if _are_rows(outputs, counts):
        try:
            return steps.combine(inverse, outputs, starts)
        except RuntimeError:
            pass  # what does not fit is named below
    labels = [branch.label for branch in chosen]
    columns, spec = checks.check_outputs(outputs, counts, labels, order.device)
    combined = [
        column[0]
        if not isinstance(column[0], Tensor)
        else steps.combine(inverse, movement.same_dtype(column), starts)
        if column[0].ndim
        else sum_losses(column)
        for column in columns
    ]
    return tree.unflatten(combined, spec)


def _run_whole(
    steps: Steps,
    branches: list[Branch],
    inputs: tuple[Any, ...],
    inverse: Tensor,
    starts: list[int],
) -> Any:
    """Every branch on every sample; of each sample the output of its own."""
    outputs = [branch.call_reading(inputs, inputs) for branch in branches]
    device, counts = inverse.device, [inverse.shape[0]] * len(branches)
    if checks.single_tensors_fit(outputs, counts, device):
        return steps.select(outputs, inverse, starts)
    labels = [branch.label for branch in branches]
    columns, spec = checks.check_outputs(outputs, counts, labels, device)
    chosen = [b for b in range(len(branches)) if starts[b] < starts[b + 1]]
    combined = [
        column[0]
        if not isinstance(column[0], Tensor)
        else steps.select(movement.same_dtype(column), inverse, starts)
        if column[0].ndim
        else sum_losses([column[b] for b in chosen])
        for column in columns
    ]
    return tree.unflatten(combined, spec)


def _are_rows(outputs: list[Any], counts: list[int]) -> bool:
    """Whether each is one tensor with as many rows as it should have."""
    for output, count in zip(outputs, counts):  # noqa: B905 (strict costs as much as the check)
        if type(output) is not Tensor:
            return False
        shape = output.shape
        if not shape or shape[0] != count:
            return False
    return True


def _num_rows(inputs: tuple[Any, ...]) -> int:
    """N, or 0 unless all inputs are plain tensors of N samples on one device."""
    num_rows, device = 0, None
    for tensor in inputs:
        if type(tensor) is not Tensor or tensor.is_sparse or tensor.is_meta or not tensor.ndim:
            return 0
        size = tensor.shape[0]
        if device is not None and (size != num_rows or tensor.device != device):
            return 0
        num_rows, device = size, tensor.device
    return num_rows
