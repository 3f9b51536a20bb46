"""The ops themselves: torch.library.opcheck without exceptions, and what they return."""

from itertools import pairwise

import dynmm_kernels  # noqa: F401  registers the ops
import pytest
import torch
from torch import Tensor

import oracle
from tensors import (
    LAYOUTS,
    SELECTIONS,
    oracle_plan,
    random_selection,
    row_values,
    selection_of,
)

pytestmark = pytest.mark.usefixtures("backend")

ops = torch.ops.dynmm_kernels
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
ARRANGED = ["contiguous", "reversed strides", "one row expanded"]
ROW_SHAPES = [(), (2, 4), (0,)]
ROUTED = ["top1 with holes, branches 1 and 2 starved", "top3 with holes and repeats"]


def check(op, *arguments) -> None:
    results = torch.library.opcheck(op.default, arguments, test_utils=CHECKS)
    assert set(results) == set(CHECKS)
    assert set(results.values()) == {"SUCCESS"}


def arranged(tensor: Tensor, layout: str) -> Tensor:
    unchanged = layout == "contiguous" or tensor.numel() == 0 or tensor.dim() < 2
    return tensor if unchanged else LAYOUTS[layout](tensor)


def entry_table(selection: Tensor) -> Tensor:
    """The selection as the op takes it: ranked choices [N, k]."""
    if selection.dtype is torch.bool:
        return torch.where(selection, torch.arange(selection.shape[1]), -1)
    return selection.reshape(len(selection), -1)


def routed(name: str) -> tuple[Tensor, Tensor, list[int], int]:
    """order, inverse, starts [B + 1] and ranks of a named selection, from the oracle."""
    plan = oracle_plan(*selection_of(name))
    inverse = torch.tensor(plan.inverse, dtype=torch.int32)
    return torch.tensor(plan.order, dtype=torch.int32), inverse, plan.offsets, plan.ranks


def outputs_of(starts: list[int], row_shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    sizes = [stop - start for start, stop in pairwise(starts)]
    return [torch.randn(size, *row_shape).to(dtype) for size in sizes]


@pytest.mark.parametrize("layout", ARRANGED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("rows", "ranks"), [(0, 2), (1, 1), (33, 3)])
def test_route(rows, ranks, dtype, layout):
    selection = arranged(random_selection(rows, ranks, 3).to(dtype), layout)
    check(ops.route, selection, 3)
    order, inverse, header = ops.route(selection, 3)
    expected = oracle_plan(selection, 3)
    assert order.dtype == inverse.dtype == header.dtype == torch.int32
    assert order.tolist() == expected.order
    assert inverse.shape == (rows, ranks)
    assert inverse.tolist() == expected.inverse
    assert header.tolist() == [*expected.offsets, 0, -1]


@pytest.mark.parametrize("name", SELECTIONS)
def test_route_of_named_selections(name):
    selection, num_branches = selection_of(name)
    expected = oracle_plan(selection, num_branches)
    _, inverse, header = ops.route(entry_table(selection), num_branches)
    assert inverse.tolist() == expected.inverse
    assert header.tolist() == [*expected.offsets, 0, -1]


@pytest.mark.parametrize("rows", [5, 70_000])
def test_route_counts_faulty_entries(rows):
    selection = torch.zeros(rows, 2, dtype=torch.int64)
    selection[3, 1], selection[4, 0], selection[-1, -1] = -2, 2**32 + 1, 2
    check(ops.route, selection[:5], 2)
    header = ops.route(selection, 2)[2]
    assert header[-2:].tolist() == [3, 7]


@pytest.mark.parametrize("layout", ARRANGED)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize(("rows", "num_branches"), [(0, 2), (1, 1), (33, 3), (1025, 8)])
def test_route_argmax(rows, num_branches, dtype, layout):
    """Ties go to the lowest branch; a branch may be closed with -inf."""
    logits = torch.randint(0, 3, (rows, num_branches)).to(dtype)
    logits[::5, 1:] = -torch.inf
    logits = arranged(logits, layout)
    if rows == 33 or (rows == 0 and layout == "contiguous"):
        check(ops.route_argmax, logits)
    choice, order, inverse, header = ops.route_argmax(logits)
    lowest = [row.index(max(row)) for row in logits.tolist()]
    expected = oracle.route(lowest, num_branches, 1)
    assert choice.shape == (rows,)
    assert choice.tolist() == lowest
    assert order.tolist() == expected.order
    assert inverse.tolist() == expected.inverse
    assert header.tolist() == [*expected.offsets, 0, -1]


@pytest.mark.parametrize(
    "row",
    [[torch.nan, 1.0], [1.0, torch.nan], [-torch.inf, -torch.inf], [torch.inf, 1.0]],
    ids=str,
)
def test_route_argmax_of_rows_without_a_softmax(row):
    """They are faulty: no branch, counted, the first one named."""
    logits = torch.tensor([[0.0, 1.0], row, row, [2.0, 1.0]])
    choice, order, inverse, header = ops.route_argmax(logits)
    assert choice.tolist() == [1, -1, -1, 0]
    assert order.tolist() == [3, 0, -1, -1]
    assert inverse.tolist() == [[1], [-1], [-1], [0]]
    assert header.tolist() == [0, 1, 2, 2, 1]


@pytest.mark.parametrize("layout", ARRANGED)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ROUTED)
def test_gather_rows(name, weighted, layout):
    """Several sources in one call, each with its own span of slots, rows moved or weighted."""
    order, inverse, starts, ranks = routed(name)
    sources = [arranged(torch.randn(len(inverse), *shape), layout) for shape in ROW_SHAPES]
    dtypes = [torch.float32] * 3 if weighted else [torch.float64, torch.uint8, torch.half]
    sources = [source.to(dtype) for source, dtype in zip(sources, dtypes, strict=True)]
    begins, ends = [starts[0], starts[2], 0], [starts[2], starts[-1], 0]
    weights = arranged(torch.rand(inverse.shape), layout) if weighted else None
    check(ops.gather_rows, sources, begins, ends, order, ranks, weights)
    results = ops.gather_rows(sources, begins, ends, order, ranks, weights)
    assert len(results) == 3
    w = None if weights is None else weights.tolist()
    for result, source, begin, end in zip(results, sources, begins, ends, strict=True):
        rows = oracle.gather_rows(
            row_values(source), begin, end, order.tolist(), ranks, w, oracle.fp32
        )
        assert result.dtype == source.dtype
        assert result.shape == (end - begin, *source.shape[1:])
        assert row_values(result) == rows


def test_gather_rows_of_nothing():
    order = torch.empty(0, dtype=torch.int32)
    check(ops.gather_rows, [torch.randn(0, 3)], [0], [0], order, 1, None)
    check(ops.gather_rows, [torch.randn(0, 3)], [0], [0], order, 2, torch.rand(0, 2))


@pytest.mark.parametrize("layout", ARRANGED)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("name", ROUTED)
def test_combine_rows(name, row_shape, weighted, layout):
    """Also with the outputs of some branches only: their complement counts as zero."""
    _, inverse, starts, _ = routed(name)
    outputs = [arranged(y, layout) for y in outputs_of(starts, row_shape, torch.float64)]
    weights = arranged(torch.rand(inverse.shape).double(), layout) if weighted else None
    inverse = arranged(inverse, layout) if layout != "one row expanded" else inverse
    w = None if weights is None else weights.tolist()
    check(ops.combine_rows, outputs[1:], starts[1:-1], inverse, weights)
    zero = [0.0] * torch.Size(row_shape).numel()
    for given in (slice(None), slice(0, 1), slice(1, None)):
        some, begins = outputs[given], starts[:-1][given]
        result = ops.combine_rows(some, begins, inverse, weights)
        rows = oracle.combine_rows([row_values(y) for y in some], begins, inverse.tolist(), zero, w)
        expected = torch.tensor(rows, dtype=torch.float64).reshape(len(inverse), *row_shape)
        assert result.shape == expected.shape
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.half, torch.complex64], ids=str)
def test_combine_rows_moves_any_dtype(dtype):
    _, inverse, starts, _ = routed("top1 with holes, branches 1 and 2 starved")
    outputs = outputs_of(starts, (3,), dtype)
    check(ops.combine_rows, outputs, starts[:-1], inverse, None)
    empty = torch.empty(0, 1, dtype=torch.int32)
    check(ops.combine_rows, [y[:0] for y in outputs], [0] * len(outputs), empty, None)


@pytest.mark.parametrize("layout", ARRANGED)
@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_row_dots(dtype, row_shape, layout):
    _, inverse, starts, _ = routed("top3 with holes and repeats")
    outputs = [arranged(y, layout) for y in outputs_of(starts, row_shape, dtype)]
    rows = arranged(torch.randn(len(inverse), *row_shape).to(dtype), layout)
    check(ops.row_dots, rows, outputs[1:3], starts[1:3], inverse)
    precision = torch.promote_types(dtype, torch.float32)
    for given in (slice(None), slice(1, 3)):
        some, begins = outputs[given], starts[:-1][given]
        dots = ops.row_dots(rows, some, begins, inverse)
        assert dots.dtype == precision
        assert dots.shape == inverse.shape
        exact = oracle.row_dots(
            row_values(rows), [row_values(y) for y in some], begins, inverse.tolist()
        )
        exact = torch.tensor(exact, dtype=torch.float64)
        scale = exact.abs().max().item()
        assert (dots - exact).abs().max().item() <= 4 * torch.finfo(precision).eps * scale


def test_row_dots_of_nothing():
    inverse = torch.empty(0, 2, dtype=torch.int32)
    check(ops.row_dots, torch.randn(0, 3), [torch.randn(0, 3)], [0], inverse)
