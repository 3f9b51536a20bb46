"""What every op refuses, and the words; the C++ kernels check the same in the same order.

Everything that can be told without reading a tensor: whoever passes these checks reads and writes
within the tensors, whatever their values are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

MAX_BRANCHES = 2**20
MAX_ENTRIES = 2**31 - 2
MAX_SLOTS = 2**31 - 1
MAX_MODALITIES = 8
ENERGY, SOFTMAX, UNIFORM, GIVEN = range(4)  # where the weights of energy_fuse come from

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WEIGHTED = (*FLOATING, torch.complex64, torch.complex128)
SUMMED = (*WEIGHTED, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_CHOICES = (*SUMMED[len(WEIGHTED) :], torch.uint16, torch.uint32)
_A_FLOAT = "float64, float32, float16 or bfloat16"


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and of row dots for values of `dtype`."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def route(selection: Tensor, num_branches: int) -> None:
    _together("route", "selection", selection)
    mask = selection.dtype == torch.bool
    if not mask and selection.dtype not in _CHOICES:
        _refuse("route", f"selection must be bool or integer but uint64; got {_told(selection)}")
    if not 1 <= num_branches <= MAX_BRANCHES:
        _refuse("route", f"num_branches must be in 1..{MAX_BRANCHES}; got {num_branches}")
    if mask and (selection.ndim != 2 or selection.shape[1] != num_branches):
        _refuse("route", f"a bool selection must be [N, {num_branches}]; got {_told(selection)}")
    if selection.ndim not in (1, 2) or (selection.ndim == 2 and selection.shape[1] < 1):
        _refuse("route", f"selection must be [N] or [N, k>=1]; got {_told(selection)}")
    if selection.numel() > MAX_ENTRIES:
        _refuse("route", f"at most {MAX_ENTRIES} entries are sorted; got {_told(selection)}")


def route_argmax(logits: Tensor) -> None:
    _together("route_argmax", "logits", logits)
    if logits.dtype not in FLOATING or logits.ndim != 2 or logits.shape[1] < 1:
        _refuse("route_argmax", f"logits must be {_A_FLOAT} [N, B>=1]; got {_told(logits)}")
    if logits.shape[1] > MAX_BRANCHES:
        _refuse("route_argmax", f"at most {MAX_BRANCHES} branches; got {_told(logits)}")
    if logits.shape[0] > MAX_ENTRIES:
        _refuse("route_argmax", f"at most {MAX_ENTRIES} entries are sorted; got {_told(logits)}")


def gather_rows(
    sources: Sequence[Tensor],
    starts: Sequence[int],
    stops: Sequence[int],
    order: Tensor,
    ranks: int,
    weights: Tensor | None = None,
) -> None:
    op = "gather_rows"
    _together(op, "order", order, *sources, *(() if weights is None else (weights,)))
    if order.dtype != torch.int32 or order.ndim != 1:
        _refuse(op, f"order must be int32 [E]; got {_told(order)}")
    if len(starts) != len(sources) or len(stops) != len(sources):
        counts = f"{len(starts)} and {len(stops)}"
        _refuse(op, f"wanted one start and one stop per source, {len(sources)}; got {counts}")
    if ranks < 1:
        _refuse(op, f"ranks must be at least 1; got {ranks}")
    entries = order.shape[0]
    for i, (source, start, stop) in enumerate(zip(sources, starts, stops, strict=True)):
        if source.ndim < 1:
            _refuse(op, f"source {i} must be [N, ...]; got {_told(source)}")
        if are_known(start, stop, entries) and not 0 <= start <= stop <= entries:
            wanted = f"0 <= start <= stop <= {entries}, the entries of order"
            _refuse(op, f"wanted {wanted}; got {start} and {stop} for source {i}")
        if weights is not None:
            _weights(op, f"source {i}", source, weights, entries, "order")


def combine_rows(
    outputs: Sequence[Tensor],
    starts: Sequence[int],
    inverse: Tensor,
    weights: Tensor | None = None,
) -> None:
    op = "combine_rows"
    _together(op, "inverse", inverse, *outputs, *(() if weights is None else (weights,)))
    _slots(op, outputs, starts, inverse)
    if weights is not None:
        _weights(op, "output 0", outputs[0], weights, inverse.numel(), "inverse")
    elif inverse.shape[1] > 1 and outputs[0].dtype not in SUMMED:
        _refuse(op, f"{_name(outputs[0].dtype)} cannot be summed; convert to a floating dtype")


def row_dots(
    rows: Tensor, outputs: Sequence[Tensor], starts: Sequence[int], inverse: Tensor
) -> None:
    op = "row_dots"
    _together(op, "inverse", inverse, rows, *outputs)
    _slots(op, outputs, starts, inverse)
    first, shape = outputs[0], (inverse.shape[0], *outputs[0].shape[1:])
    if first.dtype not in WEIGHTED:
        _refuse(op, f"output 0 must be floating or complex; got {_told(first)}")
    if rows.dtype != first.dtype or rows.shape != shape:
        _refuse(op, f"rows must be {_name(first.dtype)} {list(shape)}; got {_told(rows)}")


def se_add(main: Tensor, aux: Tensor, main_scale: Tensor, aux_scale: Tensor) -> None:
    op = "se_add"
    _together(op, "main", main, aux, main_scale, aux_scale)
    _maps(op, "main", main)
    _like(op, "aux", aux, "main", main)
    if aux.shape[0] > main.shape[0]:
        _refuse(op, f"aux must have at most the {main.shape[0]} rows of main; got {_told(aux)}")
    shape = aux.shape[:2]
    _factors(op, "main_scale", main_scale, main, shape)
    _factors(op, "aux_scale", aux_scale, main, shape)


def se_add_means(maps: Tensor) -> None:
    _together("se_add_means", "maps", maps)
    _maps("se_add_means", "maps", maps)


def se_add_dots(grad: Tensor, main: Tensor, aux: Tensor) -> None:
    op = "se_add_dots"
    _together(op, "grad", grad, main, aux)
    _maps(op, "grad", grad)
    for name, maps in (("main", main), ("aux", aux)):
        _like(op, name, maps, "grad", grad)
    for name, maps in (("grad", grad), ("main", main)):
        if maps.shape[0] < aux.shape[0]:
            rows = f"the {aux.shape[0]} rows of aux"
            _refuse(op, f"{name} must have at least {rows}; got {_told(maps)}")


def se_add_grads(
    grad: Tensor, main_scale: Tensor, aux_scale: Tensor, main_shift: Tensor, aux_shift: Tensor
) -> None:
    op = "se_add_grads"
    _together(op, "grad", grad, main_scale, aux_scale, main_shift, aux_shift)
    _maps(op, "grad", grad)
    active = main_scale.shape[0] if main_scale.ndim else 0
    shape = (active, grad.shape[1])
    for name, factors in (
        ("main_scale", main_scale),
        ("aux_scale", aux_scale),
        ("main_shift", main_shift),
        ("aux_shift", aux_shift),
    ):
        _factors(op, name, factors, grad, shape)
    if active > grad.shape[0]:
        rows = f"the {grad.shape[0]} rows of grad"
        _refuse(op, f"main_scale must have at most {rows}; got {_told(main_scale)}")


def energy_fuse(
    logits: Sequence[Tensor],
    targets: Tensor | None,
    present: Tensor | None,
    weights: Tensor | None,
    weighting: int,
) -> None:
    _energies("energy_fuse", logits, targets, present, weights, weighting)


def energy_fuse_grads(
    logits: Sequence[Tensor],
    targets: Tensor | None,
    present: Tensor | None,
    weights: Tensor | None,
    weighting: int,
    energies: Tensor,
    grad_fused: Tensor | None,
    grad_confidence: Tensor | None,
    grad_losses: Tensor | None,
) -> None:
    op = "energy_fuse_grads"
    _energies(op, logits, targets, present, weights, weighting)
    first, grads = logits[0], (energies, grad_fused, grad_confidence, grad_losses)
    _together(op, "logits 0", first, *(grad for grad in grads if grad is not None))
    rows, modalities, dtype = first.shape[0], len(logits), weight_dtype(first.dtype)
    _is(op, "energies", energies, dtype, [rows, modalities + 1])
    if grad_fused is not None:
        _is(op, "grad_fused", grad_fused, first.dtype, first.shape)
    if grad_confidence is not None:
        _is(op, "grad_confidence", grad_confidence, dtype, [rows, modalities])
    if grad_losses is not None:
        if targets is None:
            _refuse(op, "grad_losses must come with targets; got none")
        _is(op, "grad_losses", grad_losses, dtype, [rows, modalities + 1])


def _energies(
    op: str,
    logits: Sequence[Tensor],
    targets: Tensor | None,
    present: Tensor | None,
    weights: Tensor | None,
    weighting: int,
) -> None:
    modalities = len(logits)
    if not 1 <= modalities <= MAX_MODALITIES:
        _refuse(op, f"wanted the logits of 1..{MAX_MODALITIES} modalities; got {modalities}")
    others = (other for other in (targets, present, weights) if other is not None)
    _together(op, "logits 0", *logits, *others)
    first = logits[0]
    if first.dtype not in FLOATING or first.ndim != 2 or first.shape[1] < 1:
        _refuse(op, f"logits 0 must be {_A_FLOAT} [N, C>=1]; got {_told(first)}")
    for m, other in enumerate(logits):
        if other.dtype != first.dtype or other.shape != first.shape:
            _refuse(op, f"logits {m} must be like logits 0, {_told(first)}; got {_told(other)}")
    rows, classes, dtype = first.shape[0], first.shape[1], weight_dtype(first.dtype)
    if targets is not None:
        indices = targets.dtype == torch.int64 and list(targets.shape) == [rows]
        labels = targets.dtype == dtype and list(targets.shape) == [rows, classes]
        if not (indices or labels):
            wanted = f"int64 [{rows}] or {_name(dtype)} [{rows}, {classes}]"
            _refuse(op, f"targets must be {wanted}; got {_told(targets)}")
    if present is not None:
        _is(op, "present", present, torch.bool, [rows, modalities])
    if not 0 <= weighting <= GIVEN:
        _refuse(op, f"weighting must be in 0..{GIVEN}; got {weighting}")
    if (weights is not None) != (weighting == GIVEN):
        _refuse(op, f"weights must come with weighting {GIVEN}, and with no other")
    if weights is not None:
        _is(op, "weights", weights, dtype, [rows, modalities])


def _is(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if tensor.dtype != dtype or list(tensor.shape) != list(shape):
        _refuse(op, f"{name} must be {_name(dtype)} {list(shape)}; got {_told(tensor)}")


def _together(op: str, name: str, first: Tensor, *others: Tensor) -> None:
    """All on the device of `first`, which messages call `name`, and strided."""
    for tensor in (first, *others):
        if tensor.layout != torch.strided:
            _refuse(op, f"all tensors must be strided; got one that is {_name(tensor.layout)}")
        if tensor.device != first.device:
            where = f"on {first.device}, as {name} is; got one on {tensor.device}"
            _refuse(op, f"all tensors must be {where}")


def _slots(op: str, outputs: Sequence[Tensor], starts: Sequence[int], inverse: Tensor) -> None:
    """Outputs hold the slots from their starts on: one dtype and row shape, disjoint, ascending."""
    if inverse.dtype != torch.int32 or inverse.ndim != 2 or inverse.shape[1] < 1:
        _refuse(op, f"inverse must be int32 [N, k>=1]; got {_told(inverse)}")
    if not outputs:
        _refuse(op, "wanted at least one output; got none")
    if len(starts) != len(outputs):
        _refuse(op, f"wanted one start per output, {len(outputs)}; got {len(starts)}")
    first, stop = outputs[0], 0
    for i, (output, start) in enumerate(zip(outputs, starts, strict=True)):
        if output.ndim < 1:
            _refuse(op, f"output {i} must be [n, ...]; got {_told(output)}")
        if output.dtype != first.dtype or output.shape[1:] != first.shape[1:]:
            _refuse(op, f"output {i} must be like output 0, {_told(first)}; got {_told(output)}")
        if are_known(start, stop) and start < stop:
            _refuse(op, f"output {i} must start at slot {stop} or behind; got {start}")
        stop = start + output.shape[0]
        if are_known(stop) and stop > MAX_SLOTS:
            _refuse(op, f"output {i} must end at slot {MAX_SLOTS} or before; got {stop}")


def are_known(*numbers: int) -> bool:
    """Whether none is a symbol, that a graph in the making stands for what it is not told yet."""
    for number in numbers:
        if type(number) is not int:
            return False
    return True


def _weights(op: str, name: str, values: Tensor, weights: Tensor, entries: int, index: str) -> None:
    if values.dtype not in WEIGHTED:
        _refuse(op, f"{name} must be floating or complex to be weighted; got {_told(values)}")
    dtype = weight_dtype(values.dtype)
    if weights.dtype != dtype or weights.numel() != entries:
        wanted = f"{_name(dtype)} with {entries} elements, one per entry of {index}"
        _refuse(op, f"weights must be {wanted}; got {_told(weights)}")


def _maps(op: str, name: str, maps: Tensor) -> None:
    if maps.dtype not in FLOATING or maps.ndim < 2:
        _refuse(op, f"{name} must be {_A_FLOAT} [N, C, ...]; got {_told(maps)}")


def _like(op: str, name: str, maps: Tensor, other: str, wanted: Tensor) -> None:
    if maps.dtype != wanted.dtype or maps.shape[1:] != wanted.shape[1:]:
        _refuse(op, f"{name} must be like {other}, {_told(wanted)}; got {_told(maps)}")


def _factors(op: str, name: str, factors: Tensor, maps: Tensor, shape: Sequence[int]) -> None:
    _is(op, name, factors, weight_dtype(maps.dtype), shape)


def _refuse(op: str, why: str) -> NoReturn:
    raise RuntimeError(f"{op}: {why}")


def _told(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"


def _name(value: object) -> str:
    """A dtype or a layout as it is called behind "torch."."""
    return str(value).removeprefix("torch.")
