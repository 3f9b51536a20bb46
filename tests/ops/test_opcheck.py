"""The ops themselves: torch.library.opcheck without exceptions, and what every backend returns."""

from itertools import pairwise

import oracle
import pytest
import torch
from tensors import (
    LAYOUTS,
    SELECTIONS,
    oracle_plan,
    random_selection,
    row_values,
    selection_of,
)
from test_raw_ops import good_calls
from torch import Tensor

import dynmm_kernels
from dynmm_kernels.ops.schemas import OPS

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ARRANGED = ["contiguous", "reversed strides", "one row expanded"]
ROW_SHAPES = [(), (2, 4), (0,)]
ROUTED = ["top1 with holes, branches 1 and 2 starved", "top3 with holes and repeats"]

for_layouts = pytest.mark.parametrize("layout", ARRANGED)
for_row_shapes = pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
for_routed = pytest.mark.parametrize("name", ROUTED)
with_and_without_weights = pytest.mark.parametrize("weighted", [False, True])


@pytest.fixture
def kernels(backend):
    """The functions of a backend; torch.ops always runs the compiled ones where there are."""
    return dynmm_kernels.ops.kernels()


def opcheck(name: str, *arguments) -> None:
    """All four checks, and the same bits from the dispatcher as from the reference.

    Sums over a row take another order: they agree within a few roundings. Those over ranks do not.
    """
    op = getattr(torch.ops.dynmm_kernels, name)
    results = torch.library.opcheck(op.default, arguments, test_utils=CHECKS)
    assert results == dict.fromkeys(CHECKS, "SUCCESS")
    with dynmm_kernels.backend("reference"):
        called = getattr(dynmm_kernels.ops.kernels(), name)(*arguments)
    dispatched = op(*arguments)
    tolerance = None if OPS[name].sums and name != "combine_rows" else 0.0
    torch.testing.assert_close(dispatched, called, rtol=tolerance, atol=tolerance)


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


def selection_arguments(rows: int, ranks: int, dtype: torch.dtype, layout: str):
    return arranged(random_selection(rows, ranks, 3).to(dtype), layout), 3


def logits_arguments(rows: int, num_branches: int, dtype: torch.dtype, layout: str):
    """With ties, and branches closed with -inf."""
    logits = torch.randint(0, 3, (rows, num_branches)).to(dtype)
    logits[::5, 1:] = -torch.inf
    return (arranged(logits, layout),)


def gather_arguments(name: str, weighted: bool, layout: str):
    """Several sources in one call, each with its own span of slots; the last span is empty."""
    order, inverse, starts, ranks = routed(name)
    sources = [arranged(torch.randn(len(inverse), *shape), layout) for shape in ROW_SHAPES]
    dtypes = [torch.float32] * 3 if weighted else [torch.float64, torch.uint8, torch.half]
    sources = [source.to(dtype) for source, dtype in zip(sources, dtypes, strict=True)]
    begins, ends = [starts[0], starts[2], 0], [starts[2], starts[-1], 0]
    weights = arranged(torch.rand(inverse.shape), layout) if weighted else None
    return sources, begins, ends, order, ranks, weights


def combine_arguments(name: str, row_shape, weighted: bool, layout: str, given: slice):
    """The outputs of the `given` branches only."""
    _, inverse, starts, _ = routed(name)
    outputs = [arranged(y, layout) for y in outputs_of(starts, row_shape, torch.float64)]
    weights = arranged(torch.rand(inverse.shape).double(), layout) if weighted else None
    return outputs[given], starts[:-1][given], inverse.t().contiguous().t(), weights


def dots_arguments(name: str, row_shape, dtype: torch.dtype, layout: str, given: slice):
    _, inverse, starts, _ = routed(name)
    outputs = [arranged(y, layout) for y in outputs_of(starts, row_shape, dtype)]
    rows = arranged(torch.randn(len(inverse), *row_shape).to(dtype), layout)
    return rows, outputs[given], starts[:-1][given], inverse


@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_every_op(op):
    for arguments in good_calls(op):
        opcheck(op, *arguments)


@for_layouts
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("rows", "ranks"), [(0, 2), (1, 1), (33, 3)])
def test_opcheck_route(rows, ranks, dtype, layout):
    opcheck("route", *selection_arguments(rows, ranks, dtype, layout))


def test_opcheck_route_with_faulty_entries():
    opcheck("route", torch.tensor([[0], [7], [-2]]), 2)


@for_layouts
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "num_branches"), [(0, 2), (33, 3)])
def test_opcheck_route_argmax(rows, num_branches, dtype, layout):
    opcheck("route_argmax", *logits_arguments(rows, num_branches, dtype, layout))


@for_layouts
@with_and_without_weights
@for_routed
def test_opcheck_gather_rows(name, weighted, layout):
    opcheck("gather_rows", *gather_arguments(name, weighted, layout))


@for_layouts
@with_and_without_weights
@for_row_shapes
@for_routed
def test_opcheck_combine_rows(name, row_shape, weighted, layout):
    opcheck("combine_rows", *combine_arguments(name, row_shape, weighted, layout, slice(1, None)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.half, torch.complex64], ids=str)
def test_opcheck_combine_rows_of_any_dtype(dtype):
    _, inverse, starts, _ = routed("top1 with holes, branches 1 and 2 starved")
    opcheck("combine_rows", outputs_of(starts, (3,), dtype), starts[:-1], inverse, None)


@for_layouts
@for_row_shapes
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck_row_dots(dtype, row_shape, layout):
    opcheck("row_dots", *dots_arguments(ROUTED[1], row_shape, dtype, layout, slice(1, 3)))


def test_opcheck_of_no_samples():
    order, inverse = torch.zeros(0, dtype=torch.int32), torch.zeros(0, 2, dtype=torch.int32)
    rows, weights = torch.randn(0, 3), torch.rand(0, 2)
    for given in (None, weights):
        opcheck("gather_rows", [rows], [0], [0], order, 2, given)
        opcheck("combine_rows", [rows, rows], [0, 0], inverse, given)
    opcheck("row_dots", rows, [rows], [0], inverse)


@for_layouts
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("rows", "ranks"), [(0, 2), (1, 1), (33, 3), (4097, 2)])
def test_route(kernels, rows, ranks, dtype, layout):
    selection, num_branches = selection_arguments(rows, ranks, dtype, layout)
    order, inverse, header = kernels.route(selection, num_branches)
    expected = oracle_plan(selection, num_branches)
    assert order.dtype == inverse.dtype == header.dtype == torch.int32
    assert order.tolist() == expected.order
    assert inverse.shape == (rows, ranks)
    assert inverse.tolist() == expected.inverse
    assert header.tolist() == [*expected.offsets, 0, -1]


@pytest.mark.parametrize("name", SELECTIONS)
def test_route_of_named_selections(kernels, name):
    selection, num_branches = selection_of(name)
    expected = oracle_plan(selection, num_branches)
    _, inverse, header = kernels.route(entry_table(selection), num_branches)
    assert inverse.tolist() == expected.inverse
    assert header.tolist() == [*expected.offsets, 0, -1]


@pytest.mark.parametrize("rows", [5, 70_000])
def test_route_counts_faulty_entries(kernels, rows):
    selection = torch.zeros(rows, 2, dtype=torch.int64)
    selection[3, 1], selection[4, 0], selection[-1, -1] = -2, 2**32 + 1, 2
    assert kernels.route(selection, 2)[2][-2:].tolist() == [3, 7]


def test_route_gives_faulty_entries_no_slot(kernels):
    order, inverse, header = kernels.route(torch.tensor([0, 7, -2]), 2)
    assert order.tolist() == [0, -1, -1]
    assert inverse.tolist() == [[0], [-1], [-1]]
    assert header.tolist() == [0, 1, 1, 2, 1]


@for_layouts
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "num_branches"), [(0, 2), (1, 1), (33, 3), (1025, 8)])
def test_route_argmax(kernels, rows, num_branches, dtype, layout):
    """Ties go to the lowest branch."""
    (logits,) = logits_arguments(rows, num_branches, dtype, layout)
    choice, order, inverse, header = kernels.route_argmax(logits)
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
def test_route_argmax_of_rows_without_a_softmax(kernels, row):
    """They are faulty: no branch, counted, the first one named."""
    logits = torch.tensor([[0.0, 1.0], row, row, [2.0, 1.0]])
    choice, order, inverse, header = kernels.route_argmax(logits)
    assert choice.tolist() == [1, -1, -1, 0]
    assert order.tolist() == [3, 0, -1, -1]
    assert inverse.tolist() == [[1], [-1], [-1], [0]]
    assert header.tolist() == [0, 1, 2, 2, 1]


@for_layouts
@with_and_without_weights
@for_routed
def test_gather_rows(kernels, name, weighted, layout):
    arguments = sources, begins, ends, order, ranks, weights = gather_arguments(
        name, weighted, layout
    )
    results = kernels.gather_rows(*arguments)
    w = None if weights is None else weights.tolist()
    for result, source, begin, end in zip(results, sources, begins, ends, strict=True):
        rows = oracle.gather_rows(
            row_values(source), begin, end, order.tolist(), ranks, w, oracle.fp32
        )
        assert result.dtype == source.dtype
        assert result.shape == (end - begin, *source.shape[1:])
        assert row_values(result) == rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_are_not_rounded_to_the_dtype_of_the_rows(kernels, dtype):
    """The one product is rounded once."""
    x, order = torch.randn(64, 9).to(dtype), torch.arange(64, dtype=torch.int32)
    weights = 1 + 2.0 ** -torch.randint(9, 13, (64, 1)).float() + 2.0**-13
    (rows,) = kernels.gather_rows([x], [0], [64], order, 1, weights)
    assert torch.equal(rows, (x.float() * weights).to(dtype))
    out = kernels.combine_rows([x], [0], order.view(-1, 1), weights)
    assert torch.equal(out, rows)


@for_layouts
@with_and_without_weights
@for_row_shapes
@for_routed
@pytest.mark.parametrize("given", [slice(None), slice(0, 1), slice(1, None)], ids=str)
def test_combine_rows(kernels, given, name, row_shape, weighted, layout):
    """Branches whose outputs are not given count as zero."""
    arguments = combine_arguments(name, row_shape, weighted, layout, given)
    outputs, starts, inverse, weights = arguments
    result = kernels.combine_rows(*arguments)
    zero = [0.0] * torch.Size(row_shape).numel()
    w = None if weights is None else weights.tolist()
    rows = oracle.combine_rows([row_values(y) for y in outputs], starts, inverse.tolist(), zero, w)
    expected = torch.tensor(rows, dtype=torch.float64).reshape(len(inverse), *row_shape)
    assert result.shape == expected.shape
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1e-15, atol=1e-15)


@for_layouts
@for_row_shapes
@for_routed
@pytest.mark.parametrize("given", [slice(None), slice(1, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_row_dots(kernels, given, name, dtype, row_shape, layout):
    """<rows[n], y(n, j)> in fp32, fp64 for fp64."""
    arguments = rows, outputs, starts, inverse = dots_arguments(
        name, row_shape, dtype, layout, given
    )
    dots = kernels.row_dots(*arguments)
    precision = torch.promote_types(dtype, torch.float32)
    y = [row_values(output) for output in outputs]
    exact = torch.tensor(
        oracle.row_dots(row_values(rows), y, starts, inverse.tolist()), dtype=torch.float64
    )
    assert dots.dtype == precision
    assert dots.shape == inverse.shape
    scale = exact.abs().max().item()
    assert (dots - exact).abs().max().item() <= 4 * torch.finfo(precision).eps * scale


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_row_dots_of_complex_rows(kernels, dtype):
    """The real part of <rows[n], y(n, j)>, which is conjugate in y."""
    rows, y = torch.randn(2, 3, 5, dtype=dtype)
    inverse = torch.tensor([[2], [-1], [0]], dtype=torch.int32)
    dots = kernels.row_dots(rows, [y], [0], inverse)
    expected = [torch.vdot(y[2], rows[0]).real, dots.new_zeros(()), torch.vdot(y[0], rows[2]).real]
    torch.testing.assert_close(dots, torch.stack(expected).unsqueeze(1))


def test_slots_outside_and_slots_twice_are_refused(kernels):
    order, y = torch.arange(2, dtype=torch.int32), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"wanted 0 <= start <= stop <= 2.*got 1 and 3"):
        kernels.gather_rows([y], [1], [3], order, 1)
    with pytest.raises(RuntimeError, match="output 1 must start at slot 2 or behind; got 1"):
        kernels.combine_rows([y, y], [0, 1], order.view(2, 1))
