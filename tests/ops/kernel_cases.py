"""What every kernel must do, whoever runs it: an emulator, Triton's interpreter, a GPU.

Each check takes `run(op, *arguments)`, which runs an op on CPU tensors in its own way, and compares
with the reference: bit for bit where rows only move.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from raw_calls import flat
from tensors import (
    DTYPES,
    LAYOUTS,
    random_bits,
    random_selection,
    random_values,
    row_bytes,
    selection_of,
    wider_table,
    zero_bytes,
)
from test_raw_ops import good_calls
from torch import Tensor

import dynmm_kernels
from dynmm_kernels import ops

Run = Callable[..., Any]

ROWS = (0, 1, 2, 31, 32, 33, 1023, 1024, 1025, 16384, 16385, 65537)
NUMELS = (1, 3, 8, 1024, 40_000)
# Which outputs are combined: where the first or the last are left out, their slots hold no row.
GIVEN = (slice(None), slice(1, None), slice(0, 1))
# Maps [N, C, ...], and whether channels come last: no pixel, one, and more than one block's share;
# pixels and channels in and out of step with accesses of 16 bytes.
CONTIGUOUS_MAPS = (
    *((3, 5), (2, 16), (3, 5, 7), (2, 16, 3)),
    *((0, 3, 2), (2, 3, 0), (2, 0, 2, 2), (2, 8, 1, 1)),
)
MAPS = (
    *((shape, False) for shape in CONTIGUOUS_MAPS),
    *(
        (shape, last)
        for shape in ((3, 16, 5, 6), (2, 7, 4, 4), (2, 24, 3, 2, 5), (1, 8, 67, 65))
        for last in (False, True)
    ),
)
# Rows, classes and modalities: rows of every length that kernels tell apart, in step with accesses
# of 16 bytes and not.
ENERGIES = (
    *((0, 3, 2), (1, 1, 1), (33, 7, 2), (5, 40, 3), (3, 64, 8), (5, 101, 2)),
    *((3, 128, 2), (3, 200, 2), (2, 300, 1), (1, 1000, 2), (2, 1001, 2), (1, 4104, 3)),
)


def reference(op: str, *arguments: Any) -> Any:
    with dynmm_kernels.backend("reference"):
        return getattr(ops.kernels(), op)(*arguments)


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert row_bytes(got.cpu().reshape(1, -1)) == row_bytes(wanted.reshape(1, -1))


def results(run: Run, op: str, *arguments: Any) -> list[tuple[Tensor, Tensor]]:
    """What `run` and what the reference makes of the arguments, result by result."""
    got, wanted = run(op, *arguments), reference(op, *arguments)
    return list(zip(flat(got), flat(wanted), strict=True))


def check_moves(run: Run, op: str, *arguments: Any) -> None:
    """The op's results, one or several, are the reference's bit for bit."""
    for ours, theirs in results(run, op, *arguments):
        assert_same(ours, theirs)


def check_good_calls(run: Run, op: str) -> None:
    """The plainest calls, of which every op must have one."""
    tolerance = None if ops.schemas.OPS[op].sums else 0.0
    for arguments in good_calls(op):
        for ours, theirs in results(run, op, *arguments):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)


def check_route(run: Run, rows: int, branches: int) -> None:
    check_moves(run, "route", torch.randint(-1, branches, (rows,)), branches)
    check_moves(run, "route", random_selection(rows, 2, branches).int(), branches)
    mask = torch.rand(rows, min(branches, 8)) < 0.3
    check_moves(run, "route", mask, mask.shape[1])


def check_faults(run: Run, rows: int) -> None:
    """Values outside -1..B-1 are counted and the first is named, wherever it stands."""
    choice = torch.randint(0, 3, (rows,))
    choice[torch.randperm(rows)[: rows // 7 + 1]] = 3
    check_moves(run, "route", choice, 3)
    choice[:] = 0
    choice[-1] = -2
    check_moves(run, "route", choice, 3)


def check_argmax(run: Run, dtype: torch.dtype, rows: int) -> None:
    logits = torch.randn(rows, 5).to(dtype)
    logits[::3] = logits[::3].round()  # ties
    for faulty, value in ((7, float("nan")), (20, float("inf")), (21, float("-inf"))):
        if faulty < rows:
            logits[faulty] = value
    check_moves(run, "route_argmax", logits)


def check_movement(run: Run, name: str, layout: str, dtypes=tuple(DTYPES)) -> None:
    selection, branches = selection_of(name)
    order, inverse, header = reference("route", selection, branches)
    starts, ranks = header.tolist()[: branches + 1], inverse.shape[1]
    for dtype in dtypes:
        if layout == "misaligned" and dtype.itemsize > 1:
            continue  # a GPU has no values across alignment
        source = LAYOUTS[layout](random_bits((inverse.shape[0], 3, 5), dtype))
        arguments = ([source] * branches, starts[:-1], starts[1:], order, ranks)
        check_moves(run, "gather_rows", *arguments)
        if ranks == 1:
            gathered = reference("gather_rows", *arguments)
            for given in GIVEN:
                parts = gathered[given]
                if parts:
                    check_moves(run, "combine_rows", parts, starts[:-1][given], inverse)


def check_entries(run: Run, dtype: torch.dtype, numel: int, ranks: int) -> None:
    """Entries of an order that name no row, or no weight, read as rows of zeros."""
    rows, outside = 3, (-1, -(2**31), 2**31 - 1, 3 * ranks)
    order = torch.tensor([0, *outside, 3 * ranks - 1], dtype=torch.int32)
    for source in (random_values((rows, numel), dtype), wider_table(random_bits((rows, 4), dtype))):
        (got,) = run("gather_rows", [source], [0], [len(order)], order, ranks, None)
        held = row_bytes(source)
        zeros = [zero_bytes(source)] * len(outside)
        assert row_bytes(got.cpu()) == [held[0], *zeros, held[-1]]
    if not dtype.is_floating_point:
        return
    weights = torch.full((len(order),), 2.0, dtype=ops.weight_dtype(dtype))
    source = random_values((4 * len(order), numel), dtype)  # rows, for which there is no weight
    entries = torch.tensor([1, -1, len(order), 0, 2**31 - 1, len(order) - 1], dtype=torch.int32)
    (got,) = run("gather_rows", [source], [0], [len(entries)], entries, 1, weights)
    held = row_bytes(source * 2)
    zero = zero_bytes(source)
    assert row_bytes(got.cpu()) == [held[1], zero, zero, held[0], zero, held[len(order) - 1]]


def check_sizes(run: Run, rows: int, numel: int) -> None:
    """Two modalities in one call; rows of a few bytes, and of more than one block's share.

    Once more with rows at a gap: each then begins at another alignment.
    """
    order, inverse, header = reference("route", torch.randint(0, 3, (rows,)), 3)
    starts = header.tolist()[:4]
    sources = [random_bits((rows, numel), dtype) for dtype in (torch.float32, torch.uint8)]
    outputs = [random_bits((starts[b + 1] - starts[b], numel), torch.float16) for b in range(3)]
    for arranged in (lambda tensor: tensor, wider_table):
        given = [arranged(source) for source in sources]
        check_moves(run, "gather_rows", given, [0, 0], [rows, rows], order, 1)
        check_moves(run, "combine_rows", [*map(arranged, outputs)], starts[:-1], inverse)


def check_many_outputs(run: Run, branches: int) -> None:
    """More outputs than a small table of kernel parameters holds."""
    rows = 3 * branches
    order, inverse, header = reference("route", torch.randint(0, branches, (rows,)), branches)
    starts = header.tolist()[: branches + 1]
    source = random_bits((rows, 6), torch.float32)
    arguments = ([source] * branches, starts[:-1], starts[1:], order, 1)
    check_moves(run, "gather_rows", *arguments)
    check_moves(run, "combine_rows", reference("gather_rows", *arguments), starts[:-1], inverse)


def check_arithmetic(run: Run, dtype: torch.dtype, numel: int) -> None:
    """Within a few roundings of the reference, relative to the scale of the result."""
    rows, branches = 37, 3
    order, inverse, header = reference("route", random_selection(rows, 2, branches), branches)
    starts = header.tolist()[: branches + 1]
    real = torch.float32 if dtype.is_complex else dtype

    def values(size: int) -> Tensor:
        return random_values((size, numel), real).to(dtype)

    weights = torch.randn(rows, 2, dtype=ops.weight_dtype(dtype))
    source, outputs = values(rows), [values(starts[b + 1] - starts[b]) for b in range(branches)]
    calls: list[tuple[str, tuple]] = [
        ("gather_rows", ([source], [0], [starts[-1]], order, 2, weights)),
        ("gather_rows", ([wider_table(source)], [0], [starts[-1]], order, 2, weights)),
    ]
    for given in GIVEN:
        parts = outputs[given], starts[:-1][given], inverse
        calls += [("combine_rows", (*parts, weights)), ("row_dots", (source, *parts))]
    tables = [*map(wider_table, outputs)], starts[:-1], inverse
    calls += [("combine_rows", (*tables, weights)), ("row_dots", (wider_table(source), *tables))]
    for op, arguments in calls:
        for got, wanted in results(run, op, *arguments):
            eps = torch.finfo(got.dtype).eps
            scale = float(wanted.abs().max()) * (numel**0.5 if op == "row_dots" else 1)
            torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=4 * scale * eps)
    if not dtype.is_complex:
        check_moves(run, "combine_rows", [values(starts[-1])], [0], inverse, None)


def placed(maps: Tensor, offset: int, gap: int) -> Tensor:
    """The same maps `offset` elements into their storage, `gap` elements between two samples."""
    distance = math.prod(maps.shape[1:]) + gap
    storage = maps.new_zeros(offset + maps.shape[0] * distance)
    strides = (distance, *maps.stride()[1:])
    return storage.as_strided(maps.shape, strides, offset).copy_(maps)


def check_se_add(
    run: Run, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool, active: int
) -> None:
    """The same bits where maps are scaled; where they are summed, within a few roundings.

    Samples behind the active ones hold any bits: they move, and no sum reads them.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats[len(shape)] if channels_last else torch.contiguous_format
    wide, pixels = ops.weight_dtype(dtype), math.prod(shape[2:])

    def maps(rows: int) -> Tensor:
        head = random_values((active, *shape[1:]), dtype)
        tail = random_bits((rows - active, *shape[1:]), dtype)
        return torch.cat([head, tail]).contiguous(memory_format=memory_format)

    tensors = [maps(rows) for rows in (shape[0], shape[0], shape[0] + 1, shape[0])]
    factors = torch.randn(4, active, shape[1], dtype=wide)
    rounding = 8 * torch.finfo(wide).eps * pixels**0.5
    for offset, gap in ((0, 0), (0, 16), (1, 0), (0, 1)):
        grad, main, longer, aux = (placed(tensor, offset, gap) for tensor in tensors)
        aux = aux[:active]
        for op, arguments in (
            ("se_add", (main, aux, *factors[:2])),
            ("se_add_grads", (grad, *factors)),
        ):
            for ours, theirs in results(run, op, *arguments):
                assert_same(ours, theirs)
                assert ours.stride() == theirs.stride()
        for op, arguments, atol in (
            ("se_add_means", (aux,), rounding / max(pixels, 1)),
            ("se_add_dots", (grad, longer, aux), rounding),
        ):
            for ours, theirs in results(run, op, *arguments):
                torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=atol, equal_nan=True)


def check_energy_fuse(
    run: Run, dtype: torch.dtype, rows: int, classes: int, modalities: int
) -> None:
    """Within a few roundings; what is absent holds nan, and one class does not exist."""
    wide = ops.weight_dtype(dtype)
    present = torch.rand(rows, modalities) < 0.6
    logits = [3 * random_values((rows, classes), dtype) for _ in range(modalities)]
    poisoned = [row.masked_fill(~present[:, m, None], torch.nan) for m, row in enumerate(logits)]
    placed_logits = [placed(row, m % 2, m) for m, row in enumerate(logits)]
    named = torch.randint(0, classes, (rows,))
    named[-1:] = classes
    labels = torch.rand(rows, classes, dtype=wide)
    weights = torch.randn(rows, modalities, dtype=wide)
    grads = random_values((rows, classes), dtype), *torch.randn(2, rows, modalities + 1, dtype=wide)
    for case, (targets, weighting) in enumerate(product((None, named, labels), range(4))):
        given = weights if weighting == 3 else None
        for own, mask in ((logits, None), (placed_logits, None), (poisoned, present)):
            arguments = own, targets, mask, given, weighting, 0.1
            assert_near(run, "energy_fuse", *arguments)
            energies = reference("energy_fuse", *arguments)[3]
            incoming = [grads[0], grads[1][:, :-1], None if targets is None else grads[2]]
            if case % 3:
                incoming[case % 3 - 1] = None
            assert_near(run, "energy_fuse_grads", *arguments, case % 2 == 0, energies, *incoming)


def assert_near(run: Run, op: str, *arguments: Any) -> None:
    for ours, theirs in results(run, op, *arguments):
        assert ours.stride() == theirs.stride() or theirs.numel() == 0
        largest = theirs.abs().nan_to_num(0).max().item() if theirs.numel() else 0.0
        atol = 64 * torch.finfo(theirs.dtype).eps * max(1.0, largest)
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=atol, equal_nan=True)
