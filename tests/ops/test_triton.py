"""The Triton kernels, interpreted on the CPU, against the reference: the same bits.

Runs in a process of its own, started by test_interpreter.py: Triton reads TRITON_INTERPRET at its
import. The interpreter's bf16 arithmetic is wrong, so bf16 is only moved here.
"""

import functools
import importlib
import math
import os
from itertools import pairwise

import kernel_cases as cases
import pytest
import raw_calls
import torch
from tensors import DTYPES, LAYOUTS, random_bits, random_selection, random_values, row_bytes
from test_raw_ops import raw_list
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py, with TRITON_INTERPRET=1", allow_module_level=True)

import dynmm_kernels
from dynmm_kernels.ops import reference, weight_dtype
from dynmm_kernels.ops import triton as ops
from dynmm_kernels.ops.triton import configs

SIZES = [0, 1, 2, 31, 33, 129, 1025]
FLOATS = [torch.float64, torch.float32, torch.float16]
SUMMED = [*FLOATS, torch.complex64, torch.int64, torch.int32, torch.int16, torch.uint8]
WEIGHTED = [*FLOATS, torch.complex64]
ROW_SHAPES = [(), (3,), (7, 5), (257,), (0,), (3, 0)]


def run(op: str, *arguments):
    return getattr(ops, op)(*arguments)


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        return torch.complex(torch.randn(shape), torch.randn(shape)).to(dtype)
    return random_values(shape, dtype)


def agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        assert a.stride() == e.stride() or a.numel() == 0 or a.shape[0] == 1
        assert row_bytes(a) == row_bytes(e)


@functools.cache
def routed(rows: int, ranks: int, num_branches: int) -> tuple[Tensor, Tensor, list[int]]:
    """order, inverse and offsets, some entries without a branch."""
    order, inverse, header = reference.route(
        random_selection(rows, ranks, num_branches), num_branches
    )
    return order, inverse, header.tolist()[:-2]


def check_gather(x: Tensor, ranks: int, weights: Tensor | None = None) -> None:
    order, _, starts = routed(len(x), ranks, 3)
    arguments = [x] * 3, starts[:-1], starts[1:], order, ranks, weights
    agree(ops.gather_rows(*arguments), reference.gather_rows(*arguments))


def branch_outputs(starts: list[int], row_shape, dtype: torch.dtype, make=values) -> list[Tensor]:
    sizes = [stop - start for start, stop in pairwise(starts)]
    return [make((size, *row_shape), dtype) for size in sizes]


def check_combine(*arguments) -> None:
    agree([ops.combine_rows(*arguments)], [reference.combine_rows(*arguments)])


def check_dots(rows: Tensor, *arguments) -> None:
    """Sums in another order: to a few roundings of the sum of the terms' sizes."""
    dots, expected = ops.row_dots(rows, *arguments), reference.row_dots(rows, *arguments)
    assert dots.dtype == expected.dtype
    assert dots.shape == expected.shape
    numel = max(1, math.prod(rows.shape[1:]))
    largest = max([1.0, *(y.abs().max().item() for y in (rows, *arguments[0]) if y.numel())])
    tolerance = 4 * torch.finfo(dots.dtype).eps * numel * largest**2
    assert torch.allclose(dots, expected, rtol=0, atol=tolerance)
    assert torch.equal(dots == 0, expected == 0)


def check_route(selection: Tensor, num_branches: int) -> None:
    agree(ops.route(selection, num_branches), reference.route(selection, num_branches))


@pytest.mark.parametrize("num_branches", [1, 3, 40])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rows", SIZES)
def test_route(rows, ranks, num_branches):
    check_route(random_selection(rows, ranks, num_branches), num_branches)


@pytest.mark.parametrize("num_branches", [1, 3, 33])
@pytest.mark.parametrize("rows", [0, 1, 33, 129])
def test_route_of_masks(rows, num_branches):
    check_route(torch.rand(rows, num_branches) < 0.5, num_branches)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_route_of_integer_dtypes(dtype):
    """255 is a branch of its own in uint8, and no branch where there are fewer."""
    selection = torch.arange(120).to(dtype)
    check_route(selection, 120)
    selection[7] = torch.iinfo(dtype).max
    check_route(selection, 120)
    check_route(selection[::2], 120)


@pytest.mark.parametrize("branch", [0, 2, -1])
def test_route_of_all_to_one(branch):
    check_route(torch.full((300,), branch), 3)


def test_route_counts_faulty_entries():
    """Also those that would turn into a branch, or -1, if they were cut to 32 bits."""
    selection = torch.zeros(200, 2, dtype=torch.int64)
    selection[150, 1], selection[160, 0], selection[-1, -1] = 2**32 + 1, -2, 2**32 - 1
    check_route(selection, 2)
    assert ops.route(selection, 2)[2].tolist()[-2:] == [3, 301]


def test_route_over_more_tiles_than_one_scan_takes(monkeypatch):
    module = importlib.import_module(f"{ops.__name__}.route")
    monkeypatch.setattr(module, "ROUTE_SCAN", 4)
    selection = random_selection(1025, 1, 3)
    selection[900] = 7
    check_route(selection, 3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "num_branches"), [(0, 2), (1, 1), (33, 3), (129, 8), (33, 130)])
def test_route_argmax(rows, num_branches, dtype):
    """With ties, infinities, nan and rows closed with -inf."""
    logits = torch.randint(0, 3, (rows, num_branches)).to(dtype)
    for row, value in ((1, torch.nan), (5, torch.inf), (7, -torch.inf), (31, torch.nan)):
        logits[row : row + 1, -1] = value
    logits[11:13] = -torch.inf
    logits[14:15, 1:] = -torch.inf
    agree(ops.route_argmax(logits), reference.route_argmax(logits))
    agree(ops.route_argmax(logits.t().contiguous().t()), reference.route_argmax(logits))


@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moves(dtype, row_shape):
    check_gather(random_bits((33, *row_shape), dtype), 2)
    _, inverse, starts = routed(33, 1, 3)
    outputs = branch_outputs(starts, row_shape, dtype, random_bits)
    check_combine(outputs, starts[:-1], inverse)


@pytest.mark.parametrize("rows", SIZES)
def test_moves_of_sizes(rows):
    check_gather(random_bits((rows, 5), torch.float32), 1)
    _, inverse, starts = routed(rows, 1, 3)
    outputs = branch_outputs(starts, (5,), torch.uint8, random_bits)
    check_combine(outputs, starts[:-1], inverse)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_moves_of_layouts(dtype, layout):
    arrange = LAYOUTS[layout]
    check_gather(arrange(random_bits((33, 2, 3, 4), dtype)), 2)
    _, inverse, starts = routed(33, 1, 3)
    outputs = branch_outputs(starts, (7, 5), dtype, random_bits)
    check_combine([arrange(y) for y in outputs], starts[:-1], inverse)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_rows_at_odd_distances(columns):
    """Columns of a wider table: a row may begin where no wide access can."""
    check_gather(random_bits((33, 5), torch.float16)[:, :columns], 1)
    _, inverse, starts = routed(33, 1, 3)
    outputs = branch_outputs(starts, (5,), torch.float16, random_bits)
    check_combine([y[:, :columns] for y in outputs], starts[:-1], inverse)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [0, 3])
def test_entries_that_name_no_row_are_zeros(rows, weighted):
    """Also where the source has no row at all, and where an entry names a row but no weight."""
    order = torch.tensor([0, -1, 5, 6, 2**31 - 1, -(2**31), 4], dtype=torch.int32)
    x = torch.randn(rows, 5)
    for ranks in (1, 2):
        weights = torch.rand(7) if weighted else None
        arguments = [x, x], [0, 2], [7, 5], order, ranks, weights
        agree(ops.gather_rows(*arguments), reference.gather_rows(*arguments))
    head = [x], [0], [2], order[:2] + 2, 1, torch.rand(2)
    agree(ops.gather_rows(*head), reference.gather_rows(*head))


def test_channels_last_stays():
    x = random_bits((33, 3, 4, 5), torch.float16).contiguous(memory_format=torch.channels_last)
    check_gather(x, 1)
    order, inverse, starts = routed(33, 1, 3)
    parts = ops.gather_rows([x] * 3, starts[:-1], starts[1:], order, 1)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)
    check_combine([parts[0], parts[1].contiguous(), parts[2]], starts[:-1], inverse)


@pytest.mark.parametrize("tile", configs.MOVE, ids=str)
def test_every_tile_of_moves(tile):
    """One row more and one unit less than the tile, and rows of many tiles."""
    for units in (tile.units - 1, tile.units):
        check_gather(random_bits((min(3 * tile.rows + 1, 100), units), torch.int64), 1)
    _, inverse, starts = routed(65, 1, 3)
    for units in (tile.units, 2 * tile.units + 1):
        outputs = branch_outputs(starts, (units,), torch.int64, random_bits)
        check_combine(outputs, starts[:-1], inverse)


@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", SUMMED, ids=str)
def test_sums(dtype, row_shape):
    _, inverse, starts = routed(33, 2, 3)
    check_combine(branch_outputs(starts, row_shape, dtype), starts[:-1], inverse)


@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", WEIGHTED, ids=str)
def test_weighted(dtype, ranks, row_shape):
    weights = torch.rand(33, ranks).to(weight_dtype(dtype))
    _, inverse, starts = routed(33, ranks, 3)
    x, outputs = values((33, *row_shape), dtype), branch_outputs(starts, row_shape, dtype)
    check_gather(x, ranks, weights)
    check_combine(outputs, starts[:-1], inverse, weights)
    check_dots(x, outputs, starts[:-1], inverse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arithmetic_on_layouts(layout):
    arrange = LAYOUTS[layout]
    _, inverse, starts = routed(33, 2, 3)
    x = arrange(torch.randn(33, 7, 5))
    outputs = [arrange(y) for y in branch_outputs(starts, (7, 5), torch.float32)]
    weights = torch.rand(2, 33).t()
    check_gather(x, 2, weights)
    check_combine(outputs, starts[:-1], inverse, weights)
    check_dots(x, outputs, starts[:-1], inverse)


@pytest.mark.parametrize("rows", SIZES)
def test_arithmetic_of_sizes(rows):
    _, inverse, starts = routed(rows, 2, 3)
    x, outputs = torch.randn(rows, 5), branch_outputs(starts, (5,), torch.float32)
    weights = torch.rand(rows, 2)
    check_gather(x, 2, weights)
    check_combine(outputs, starts[:-1], inverse, weights)
    check_dots(x, outputs, starts[:-1], inverse)


@pytest.mark.parametrize("tile", sorted({*configs.SUM, *configs.DOT}), ids=str)
def test_every_tile_of_arithmetic(tile):
    _, inverse, starts = routed(67, 2, 3)
    weights = torch.rand(67, 2)
    for units in (tile.units - 1, tile.units, 2 * tile.units + 1):
        x, outputs = torch.randn(67, units), branch_outputs(starts, (units,), torch.float32)
        check_gather(x, 2, weights)
        check_combine(outputs, starts[:-1], inverse, weights)
        check_dots(x, outputs, starts[:-1], inverse)


@pytest.mark.parametrize("given", [slice(0, 1), slice(1, None), slice(3, 37), slice(None, None, 2)])
def test_outputs_that_are_not_given_count_as_zero(given):
    """Up to 40 of them: more than one kernel reads, with gaps. Weights of no row may be nan."""
    for ranks in (1, 2):
        _, inverse, starts = routed(129, ranks, 40)
        outputs = branch_outputs(starts, (3,), torch.float32)[given]
        begins = starts[:-1][given]
        held = torch.zeros(inverse.shape, dtype=torch.bool)
        for start, output in zip(begins, outputs, strict=True):
            held |= (inverse >= start) & (inverse < start + len(output))
        weights = torch.rand(129, ranks).masked_fill(~held, torch.nan)
        check_combine(outputs, begins, inverse)
        check_combine(outputs, begins, inverse, weights)
        check_dots(torch.randn(129, 3), outputs, begins, inverse)


def test_no_output_has_rows():
    inverse = torch.full((5, 2), -1, dtype=torch.int32)
    outputs = [torch.zeros(0, 3)] * 2
    check_combine(outputs, [0, 0], inverse)
    check_combine(outputs, [0, 0], inverse[:, :1])
    check_dots(torch.randn(5, 3), outputs, [0, 0], inverse)


@pytest.mark.parametrize(("shape", "channels_last"), cases.MAPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_se_add(dtype, shape, channels_last):
    for active in {0, min(1, shape[0]), shape[0]}:
        cases.check_se_add(run, dtype, shape, channels_last, active)


@pytest.mark.parametrize(
    ("rows", "classes", "modalities"), [(0, 3, 2), (1, 1, 2), (3, 40, 3), (5, 7, 1)]
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_energy_fuse(dtype, rows, classes, modalities):
    cases.check_energy_fuse(run, dtype, rows, classes, modalities)


def test_energy_fuse_of_as_many_as_it_takes():
    cases.check_energy_fuse(run, torch.float32, 2, 3, 8)


@pytest.mark.parametrize("tile", configs.CLASSES, ids=str)
def test_every_tile_of_classes(tile):
    """One row more than the tile has, and one class less, or more than the longest row held."""
    classes = tile.units + (1 if tile == configs.CLASSES[-1] else -1)
    cases.check_energy_fuse(run, torch.float32, tile.rows + 1, classes, 2)


@pytest.mark.parametrize("classes", [4, 1024, 4104])
def test_classes_in_step_with_wide_accesses(classes):
    cases.check_energy_fuse(run, torch.float16, 1, classes, 1)


@pytest.mark.parametrize("classes", [9, 3000])
@pytest.mark.parametrize("first", [0.0, -1e3, -torch.inf, torch.inf, torch.nan])
def test_energies_that_are_not_finite(first, classes):
    """As torch.logsumexp, wherever in a row the infinity stands, and however low the row before."""
    logits = torch.full((4, classes), first, dtype=torch.float64)
    logits[1, -1], logits[2, -1], logits[3, -1] = 5.0, torch.inf, torch.nan
    energies = run("energy_fuse", [logits], None, None, None, 0, 0.1)[3][:, 0]
    torch.testing.assert_close(energies, logits.logsumexp(1), rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_small_losses_of_labels(dtype):
    """log(1 + exp(-40)) is not lost beside 1."""
    logits, labels = torch.full((1, 3), 40.0, dtype=dtype), torch.ones(1, 3, dtype=dtype)
    losses = run("energy_fuse", [logits], labels, None, torch.ones(1, 1, dtype=dtype), 3, 0.1)[2]
    torch.testing.assert_close(losses, torch.full_like(losses, math.exp(-40)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_energies_of_rows_that_are_given_once(dtype):
    """Rows are read where they lie: also one row for all samples, and columns of wider tables."""
    one, table = torch.randn(1, 5).to(dtype).expand(9, 5), torch.randn(9, 16).to(dtype)
    gradient = torch.ones(1, 1).to(dtype).expand(9, 5)
    for logits in ([one, table[:, 3:8]], [table[:, ::3][:, :5], table.t()[4:9].t()]):
        cases.assert_near(run, "energy_fuse", logits, None, None, None, 1, 0.1)
        energies = reference.energy_fuse(logits, None, None, None, 1, 0.1)[3]
        arguments = [logits, None, None, None, 1, 0.1, False, energies, gradient, None, None]
        cases.assert_near(run, "energy_fuse_grads", *arguments)


def test_conjugate_and_negative_views():
    x = torch.randn(33, 4, dtype=torch.complex64)
    _, inverse, starts = routed(33, 1, 3)
    for view in (x.conj(), x.conj().imag):
        check_gather(view, 1)
        outputs = [view[start:stop] for start, stop in pairwise(starts)]
        check_combine(outputs, starts[:-1], inverse)
        check_dots(view, outputs, starts[:-1], inverse)


def test_raw_calls():
    """Right or wrong ones: refused in the words of the reference, or its result."""
    calls = [call for _, call in raw_list()] + list(raw_calls.random_calls(150, seed=0))
    for call in calls:
        if torch.bfloat16 not in raw_calls.dtypes(call):
            problem = raw_calls.difference(run, call)
            assert problem is None, f"{call[0]}{raw_calls.told(call[1])}: {problem}"


def test_arithmetic_is_refused_where_there_is_none():
    _, inverse, starts = routed(5, 2, 3)
    outputs = branch_outputs(starts, (3,), torch.bool, random_bits)
    with pytest.raises(RuntimeError, match="bool cannot be summed; convert to a floating dtype"):
        ops.combine_rows(outputs, starts[:-1], inverse)


def test_backend_serves_a_training_step():
    """The same gradients as the reference, through the public functions."""
    results = []
    for name in ("reference", "triton"):
        torch.manual_seed(0)
        x, w = torch.randn(33, 4, requires_grad=True), torch.rand(33, 2, requires_grad=True)
        selection = random_selection(33, 2, 3)
        with dynmm_kernels.backend(name):
            plan = dynmm_kernels.route(selection, 3)
            outputs = [part * (b + 1) for b, part in enumerate(dynmm_kernels.gather(plan, x))]
            out = dynmm_kernels.combine(plan, outputs, w)
            out.square().sum().backward()
        results.append((out.detach(), x.grad, w.grad))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
