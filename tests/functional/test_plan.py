"""route: the plan equals the oracle's, bit for bit, and bad selections are refused with reasons."""

import re

import pytest
import torch
from tensors import SELECTIONS, oracle_plan, random_selection, selection_of

from dynmm_kernels import RoutingPlan, route

SIZES = [0, 1, 2, 31, 32, 33, 1023, 1024, 1025]
BRANCHES = [1, 2, 3, 8, 256]
INT_DTYPES = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
INT_DTYPES += [torch.uint16, torch.uint32, torch.uint64]

pytestmark = pytest.mark.usefixtures("backend")


def check_plan(plan: RoutingPlan, selection: torch.Tensor, num_branches: int) -> None:
    """Every field against the oracle: values, dtypes and shapes."""
    expected = oracle_plan(selection, num_branches)
    rows = selection.shape[0]
    assert (plan.num_branches, plan.num_rows, plan.ranks) == (num_branches, rows, expected.ranks)
    for name, shape in {
        "order": (rows * expected.ranks,),
        "inverse": (rows, expected.ranks),
        "offsets": (num_branches + 1,),
    }.items():
        field = getattr(plan, name)
        wanted = torch.tensor(getattr(expected, name), dtype=torch.int32).reshape(shape)
        assert field.dtype == torch.int32
        assert field.shape == shape
        assert torch.equal(field, wanted), name
    assert plan.starts == tuple(expected.offsets)
    counts = [stop - start for start, stop in zip(plan.starts[:-1], plan.starts[1:], strict=True)]
    assert plan.counts == tuple(counts)
    assert all(type(count) is int for count in plan.counts + plan.starts)
    for branch in {0, num_branches // 2, num_branches - 1}:
        start, stop = expected.offsets[branch : branch + 2]
        wanted_rows = [entry // expected.ranks for entry in expected.order[start:stop]]
        assert plan.rows(branch).dtype == torch.int64
        assert plan.rows(branch).tolist() == wanted_rows


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("num_branches", BRANCHES)
@pytest.mark.parametrize("rows", SIZES)
def test_sizes(rows, num_branches, ranks):
    selection = random_selection(rows, ranks, num_branches)
    check_plan(route(selection, num_branches), selection, num_branches)


@pytest.mark.parametrize(
    ("num_branches", "ranks"), [(1, 3), (2, 1), (3, 2), (8, 1), (256, 1), (256, 3)]
)
def test_large(num_branches, ranks):
    selection = random_selection(65537, ranks, num_branches)
    check_plan(route(selection, num_branches), selection, num_branches)


@pytest.mark.parametrize("num_branches", BRANCHES)
@pytest.mark.parametrize("rows", [0, 1, 33, 1025, 5000])
def test_one_dimensional(rows, num_branches):
    selection = random_selection(rows, 1, num_branches).flatten()
    check_plan(route(selection, num_branches), selection, num_branches)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_branches", [1, 2, 8, 256])
@pytest.mark.parametrize("rows", [0, 1, 31, 33, 1025])
def test_masks(rows, num_branches, density):
    mask = torch.rand(rows, num_branches) < density
    check_plan(route(mask, num_branches), mask, num_branches)


@pytest.mark.parametrize(
    "pattern",
    {
        "all to the first": lambda n, b: torch.zeros(n),
        "all to the last": lambda n, b: torch.full((n,), b - 1),
        "nobody anywhere": lambda n, b: torch.full((n,), -1),
        "even branches starved": lambda n, b: (torch.arange(n) * 2 + 1) % b,
        "ascending": lambda n, b: (torch.arange(n) * b) // n,
        "descending": lambda n, b: b - 1 - (torch.arange(n) * b) // n,
        "alternating": lambda n, b: torch.arange(n) % b,
        "only the last row": lambda n, b: torch.where(torch.arange(n) == n - 1, b - 1, -1),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("num_branches", BRANCHES)
@pytest.mark.parametrize("rows", [1, 33, 4097])
def test_patterns(rows, num_branches, pattern):
    selection = pattern[1](rows, num_branches).long()
    check_plan(route(selection, num_branches), selection, num_branches)


@pytest.mark.parametrize("name", SELECTIONS)
def test_named_selections(name):
    selection, num_branches = selection_of(name)
    check_plan(route(selection, num_branches), selection, num_branches)


@pytest.mark.parametrize("rows", [0, 5, 1025])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", INT_DTYPES, ids=str)
def test_integer_dtypes(dtype, ranks, rows):
    """The largest value of uint8 is branch 255, not the -1 of int8."""
    info = torch.iinfo(dtype)
    num_branches = min(info.max + 1, 300)
    selection = random_selection(rows, ranks, num_branches, holes=0.2 if info.min < 0 else 0.0)
    selection[-1:, -1] = num_branches - 1
    selection = selection.to(dtype)
    check_plan(route(selection, num_branches), selection, num_branches)


@pytest.mark.parametrize(
    "layout",
    {
        "every other row": lambda s: torch.stack([s, s.flip(0)], dim=1)[:, 0],
        "transposed": lambda s: s.t().contiguous().t(),
        "a column of a table": lambda s: torch.stack([s, s.flip(0)], dim=-1)[..., 0],
        "one row expanded": lambda s: s[:1].expand(s.shape),
        "one column expanded": lambda s: s[:, :1].expand(s.shape),
        "with an offset": lambda s: torch.cat([s[:1], s])[1:],
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.int8], ids=str)
@pytest.mark.parametrize("ranks", [1, 4])
def test_non_contiguous(layout, dtype, ranks):
    num_branches = ranks if dtype is torch.bool else 4
    selection = random_selection(1025, ranks, num_branches)
    selection = (
        layout[1](selection % 2 == 0) if dtype is torch.bool else layout[1](selection.to(dtype))
    )
    check_plan(route(selection, num_branches), selection, num_branches)
    if ranks == 1 and dtype is not torch.bool:
        check_plan(route(selection[:, 0], num_branches), selection[:, 0], num_branches)


def test_plan_owns_its_memory():
    selection = torch.tensor([1, 0, 1])
    plan = route(selection, 2)
    selection.fill_(0)
    check_plan(plan, torch.tensor([1, 0, 1]), 2)
    assert isinstance(plan, RoutingPlan)


@pytest.mark.parametrize(("rows", "ranks"), [(300_000, 1), (150_000, 2), (1025, 3), (7, 1)])
def test_number_of_threads_does_not_matter(rows, ranks, restored_threads):
    selection = random_selection(rows, ranks, 8)
    selection[: rows // 3] = 5  # uneven work for the threads
    torch.set_num_threads(1)
    alone = route(selection, 8)
    check_plan(alone, selection, 8)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        plan = route(selection, 8)
        assert torch.equal(plan.order, alone.order)
        assert torch.equal(plan.inverse, alone.inverse)
        assert torch.equal(plan.offsets, alone.offsets)


@pytest.mark.parametrize(
    "value", [3, 4, -2, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)]
)
@pytest.mark.parametrize(("rows", "row"), [(1, 0), (40, 37), (1025, 1024), (100_000, 99_991)])
def test_value_out_of_range(value, rows, row):
    """Also the values that would turn into a branch, or -1, if they were cut to 32 bits."""
    selection = torch.arange(rows) % 3
    selection[row] = value
    with pytest.raises(ValueError, match=rf"\b{row}\b") as error:
        route(selection, 3)
    assert str(value) in str(error.value)


def test_value_out_of_range_names_the_row_not_the_entry():
    selection = torch.tensor([[0, 1], [1, -1], [0, 0], [1, 77]])
    with pytest.raises(ValueError, match=r"\brow 3\b.*\b77\b|\b77\b.*\brow 3\b"):
        route(selection, 2)


def test_first_of_many_values_out_of_range_is_named():
    selection = torch.full((100_000,), -55)
    selection[:41] = 0
    selection[41] = 9
    with pytest.raises(ValueError, match=r"\b41\b") as error:
        route(selection, 2)
    assert "9" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint64, torch.uint32, torch.uint16, torch.uint8], ids=str)
def test_largest_unsigned_value_is_not_minus_one(dtype):
    largest = torch.iinfo(dtype).max
    with pytest.raises(ValueError, match=rf"\b{largest}\b"):
        route(torch.tensor([0, largest], dtype=dtype), 2)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
@pytest.mark.parametrize("shape", [(3,), (3, 2), (0,)])
def test_selection_must_be_integer_or_bool(dtype, shape):
    with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
        route(torch.zeros(shape, dtype=dtype), 2)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("rows", [0, 5])
def test_mask_of_the_wrong_width(rows, width):
    with pytest.raises(ValueError, match=rf"\[N, 3\]; got \[{rows}, {width}\]$"):
        route(torch.zeros(rows, width, dtype=torch.bool), 3)


@pytest.mark.parametrize("shape", [(), (2, 2, 2), (0, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_selection_of_the_wrong_rank(shape, dtype):
    got = re.escape(str(list(shape)))
    with pytest.raises(ValueError, match=rf"must have shape \[N.*; got {got}$"):
        route(torch.zeros(shape, dtype=dtype), 2)


@pytest.mark.parametrize("num_branches", [0, -1])
@pytest.mark.parametrize("rows", [0, 4])
def test_number_of_branches_must_be_positive(num_branches, rows):
    with pytest.raises(ValueError, match=rf"num_branches must be .*; got {num_branches}$"):
        route(torch.full((rows,), -1), num_branches)
