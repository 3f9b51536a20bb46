"""gather and combine move rows bit by bit: every dtype, shape and layout, against the oracle."""

from collections import OrderedDict, namedtuple
from itertools import pairwise

import oracle
import pytest
import torch
from tensors import (
    DTYPES,
    FLOATS,
    INTEGERS,
    LAYOUTS,
    SELECTIONS,
    TOP1,
    oracle_plan,
    random_bits,
    random_selection,
    random_values,
    row_bytes,
    row_values,
    selection_of,
    zero_bytes,
)

import dynmm_kernels
from dynmm_kernels import Shared, combine, gather, route

ROW_SHAPES = [(), (1,), (3,), (13,), (7, 5), (4, 4, 4), (257,), (0,), (3, 0)]
SIZES = [0, 1, 2, 31, 32, 33, 1023, 1024, 1025]
SUMMED = [*FLOATS, *INTEGERS]

pytestmark = pytest.mark.usefixtures("backend")


def check_gather(selection, num_branches, tensor) -> list[torch.Tensor]:
    parts = gather(route(selection, num_branches), tensor)
    expected = oracle.gather(row_bytes(tensor), oracle_plan(selection, num_branches))
    assert isinstance(parts, list)
    assert len(parts) == num_branches
    for part, rows in zip(parts, expected, strict=True):
        assert part.dtype == tensor.dtype
        assert part.shape == (len(rows), *tensor.shape[1:])
        assert row_bytes(part) == rows
    return parts


def check_move(selection, num_branches, outputs) -> torch.Tensor:
    """Unweighted top-1 combine. A branch may be None where it has no rows."""
    given = next(y for y in outputs if y is not None)
    result = combine(route(selection, num_branches), outputs)
    rows = [[] if y is None else row_bytes(y) for y in outputs]
    expected = oracle.combine(rows, oracle_plan(selection, num_branches), zero_bytes(given))
    assert result.dtype == given.dtype
    assert result.shape == (len(selection), *given.shape[1:])
    assert row_bytes(result) == expected
    return result


def check_sum(selection, num_branches, outputs) -> None:
    """Unweighted top-k combine: summed in rank order, floats up to 32 bits in fp32."""
    dtype, shape = outputs[0].dtype, outputs[0].shape[1:]
    result = combine(route(selection, num_branches), outputs)
    cast = oracle.fp32 if dtype in (torch.float32, torch.float16, torch.bfloat16) else lambda v: v
    plan = oracle_plan(selection, num_branches)
    rows = oracle.combine([row_values(y) for y in outputs], plan, [0] * shape.numel(), cast=cast)
    exact = torch.float64 if dtype.is_floating_point else torch.int64
    expected = torch.tensor(rows, dtype=exact).reshape(len(selection), *shape).to(dtype)
    assert result.dtype == dtype
    assert result.shape == expected.shape
    assert torch.equal(result, expected)


def branch_outputs(selection, num_branches, row_shape, dtype, make=random_bits):
    sizes = [stop - start for start, stop in pairwise(oracle_plan(selection, num_branches).offsets)]
    return [make((size, *row_shape), dtype) for size in sizes]


@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_row_shapes(dtype, row_shape):
    for ranks in (1, 2):
        selection = random_selection(37, ranks, 3)
        check_gather(selection, 3, random_bits((37, *row_shape), dtype))
    selection = random_selection(37, 1, 3)
    check_move(selection, 3, branch_outputs(selection, 3, row_shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("num_branches", [1, 3, 256])
@pytest.mark.parametrize("rows", SIZES)
def test_sizes(rows, num_branches, dtype):
    selection = random_selection(rows, 1, num_branches)
    parts = check_gather(selection, num_branches, random_bits((rows, 5), dtype))
    check_move(selection, num_branches, parts)


@pytest.mark.parametrize(("num_branches", "dtype"), [(1, torch.float32), (256, torch.uint8)])
def test_large(num_branches, dtype):
    selection = random_selection(65537, 1, num_branches)
    parts = check_gather(selection, num_branches, random_bits((65537, 5), dtype))
    check_move(selection, num_branches, parts)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_selections(name, dtype):
    selection, num_branches = selection_of(name)
    check_gather(selection, num_branches, random_bits((len(selection), 3), dtype))
    if name in TOP1:
        check_move(selection, num_branches, branch_outputs(selection, num_branches, (3,), dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype):
    for row_shape in [(6,), (7, 5), (2, 3, 4)]:
        selection = random_selection(33, 1, 3)
        arrange = LAYOUTS[layout]
        check_gather(selection, 3, arrange(random_bits((33, *row_shape), dtype)))
        outputs = branch_outputs(selection, 3, row_shape, dtype)
        check_move(selection, 3, [arrange(y) for y in outputs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_mixed_between_branches(dtype):
    selection = torch.arange(64) % len(LAYOUTS)
    outputs = branch_outputs(selection, len(LAYOUTS), (3, 2), dtype)
    arranged = [arrange(y) for arrange, y in zip(LAYOUTS.values(), outputs, strict=True)]
    check_move(selection, len(LAYOUTS), arranged)


def test_misaligned_layouts_are_what_they_say():
    x = random_bits((4, 3), torch.float64)
    assert LAYOUTS["misaligned"](x).data_ptr() % 8 == 1
    assert LAYOUTS["byte slice"](x).storage_offset() == 1
    assert (
        row_bytes(LAYOUTS["misaligned"](x)) == row_bytes(LAYOUTS["byte slice"](x)) == row_bytes(x)
    )


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((9, 3, 4, 5), torch.channels_last), ((9, 3, 2, 4, 5), torch.channels_last_3d)],
    ids=["2d", "3d"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_channels_last(shape, memory_format, dtype, ranks):
    x = random_bits(shape, dtype).contiguous(memory_format=memory_format)
    selection = (torch.arange(9 * ranks) % 2).reshape(ranks, 9).t()
    parts = check_gather(selection, 2, x)
    assert all(part.is_contiguous(memory_format=memory_format) for part in parts)
    if ranks == 1:
        check_move(selection, 2, parts)
        check_move(selection, 2, [parts[0], parts[1].contiguous()])


def test_lazy_conjugate_and_negative():
    x = torch.randn(9, 4, dtype=torch.complex64)
    selection = random_selection(9, 1, 2)
    for view in (x.conj(), x.conj().imag):
        parts = check_gather(selection, 2, view)
        check_move(selection, 2, [part.conj() for part in parts])


# A signalling NaN with a payload, as little-endian bytes.
SIGNALLING_NAN = {
    torch.float64: b"\x01\x02\x03\x04\x05\x06\xf0\x7f",
    torch.float32: b"\x01\x02\x80\xff",
    torch.float16: b"\x01\x7d",
    torch.bfloat16: b"\x81\x7f",
    torch.complex64: b"\x01\x02\x80\x7f\x01\x00\x80\xff",
}


@pytest.mark.parametrize("dtype", SIGNALLING_NAN, ids=str)
def test_nan_payloads_and_negative_zero_survive(dtype):
    """Nothing that only moves is ever loaded as a number."""
    nan = SIGNALLING_NAN[dtype]
    negative_zero = bytes(len(nan) - 1) + b"\x80"
    row = nan + negative_zero
    x = torch.frombuffer(bytearray(row * 6), dtype=torch.uint8).view(dtype).reshape(6, 2)
    selection = torch.tensor([1, 0, 1, -1, 1, 0])
    result = check_move(selection, 2, check_gather(selection, 2, x))
    assert row_bytes(result) == [row, row, row, bytes(len(row)), row, row]


@pytest.mark.parametrize("row_shape", [(), (3,), (7, 5), (0,)], ids=str)
@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_in_rank_order(dtype, row_shape, ranks):
    selection = random_selection(41, ranks, 4)
    check_sum(selection, 4, branch_outputs(selection, 4, row_shape, dtype, random_values))


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
def test_sums_over_a_mask(dtype):
    mask = torch.rand(65, 5) < 0.6
    check_sum(mask, 5, branch_outputs(mask, 5, (3,), dtype, random_values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SUMMED, ids=str)
def test_sums_of_layouts(layout, dtype):
    selection = random_selection(33, 2, 3)
    outputs = branch_outputs(selection, 3, (7, 5), dtype, random_values)
    check_sum(selection, 3, [LAYOUTS[layout](y) for y in outputs])


@pytest.mark.parametrize("rows", [1023, 20_001])
def test_int32_sums_are_exact(rows):
    selection = random_selection(rows, 3, 8)
    check_sum(selection, 8, branch_outputs(selection, 8, (2,), torch.int32, random_values))


def test_sums_of_half_precision_are_rounded_once():
    """In fp16 2048 + 1 is 2048; accumulated in fp32 the three ranks give 2050."""
    outputs = [torch.tensor([[value]], dtype=torch.float16) for value in (2048.0, 1.0, 1.0)]
    plan = route(torch.tensor([[0, 1, 2]]), 3)
    assert combine(plan, outputs).item() == 2050.0
    assert combine(plan, outputs, torch.ones(1, 3)).item() == 2050.0


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.int64, torch.bool, torch.complex64], ids=str
)
def test_starved_branches_may_be_none_or_empty(dtype):
    selection = torch.tensor([2, -1, 2, 0])
    rows = [random_bits((n, 3), dtype) for n in (1, 0, 2, 0)]
    check_move(selection, 4, rows)
    check_move(selection, 4, [rows[0], None, rows[2], None])
    check_move(torch.tensor([-1, -1]), 2, [random_bits((0, 3), dtype)] * 2)
    check_move(torch.tensor([-1, -1]), 2, [None, random_bits((0, 3), dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [33, 5000])
def test_under_deterministic_algorithms(dtype, rows, deterministic):
    selection = random_selection(rows, 1, 5)
    selection[selection == 3] = -1
    check_move(selection, 5, check_gather(selection, 5, random_bits((rows, 3), dtype)))
    if dtype.is_floating_point:
        selection = random_selection(rows // 4, 2, 3)
        check_sum(selection, 3, branch_outputs(selection, 3, (2,), dtype, random_values))


@pytest.mark.parametrize("row_shape", [(1,), (67,)], ids=str)
def test_number_of_threads_does_not_matter(row_shape, restored_threads):
    selection, ranked = random_selection(20_000, 1, 7), random_selection(20_000, 2, 7)
    x = random_bits((20_000, *row_shape), torch.float16)
    outputs = branch_outputs(ranked, 7, (3,), torch.float16, random_values)

    def results():
        plan = route(selection, 7)
        parts = gather(plan, x)
        return [*parts, combine(plan, parts), combine(route(ranked, 7), outputs)]

    torch.set_num_threads(1)
    alone = [row_bytes(result) for result in results()]
    check_move(selection, 7, check_gather(selection, 7, x))
    check_sum(ranked, 7, outputs)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert [row_bytes(result) for result in results()] == alone


Pack = namedtuple("Pack", ["video", "text"])


def test_gather_keeps_the_tree_and_passes_the_rest_through():
    plan = route(torch.tensor([1, 0, 1]), 2)
    video, text, lengths = (
        torch.randn(3, 2, 2),
        torch.arange(12).reshape(3, 4),
        torch.tensor([4, 2, 1]),
    )
    scalar, marker = torch.tensor(7.0), object()
    tree = {
        "pack": [[video, (text, None)], [lengths]],
        "named": Pack(video=video, text=None),
        "ordered": OrderedDict(b=text, a=lengths),
        "rest": (None, 3, 0.5, "name", True, marker, scalar, [], {}, ()),
    }
    for branch, part in enumerate(gather(plan, tree)):
        rows = plan.rows(branch)
        assert list(part) == list(tree)
        (video_rows, (text_rows, nothing)), (length_rows,) = part["pack"]
        assert type(part["pack"]) is list
        assert type(part["pack"][0][1]) is tuple
        assert nothing is None
        assert torch.equal(video_rows, video[rows])
        assert torch.equal(text_rows, text[rows])
        assert torch.equal(length_rows, lengths[rows])
        assert isinstance(part["named"], Pack)
        assert torch.equal(part["named"].video, video[rows])
        assert type(part["ordered"]) is OrderedDict
        assert list(part["ordered"]) == ["b", "a"]
        assert part["rest"][:6] == (None, 3, 0.5, "name", True, marker)
        assert part["rest"][6].equal(scalar)
        assert part["rest"][7:] == ([], {}, ())


def test_shared_tensors_are_not_gathered():
    table, x = torch.randn(3, 2), torch.randn(3)
    shared = Shared(table)
    for part in gather(route(torch.tensor([1, 0, 1]), 2), [shared, {"x": x, "table": shared}]):
        for leaf in (part[0], part[1]["table"]):
            assert leaf is table


def test_gather_of_many_leaves_in_one_call():
    selection = random_selection(19, 2, 3)
    plan = route(selection, 3)
    leaves = [random_bits((19, *shape), dtype) for shape in ROW_SHAPES for dtype in DTYPES]
    expected = oracle_plan(selection, 3)
    for branch, part in enumerate(gather(plan, leaves)):
        for leaf, rows in zip(leaves, part, strict=True):
            assert row_bytes(rows) == oracle.gather(row_bytes(leaf), expected)[branch]


def test_combine_keeps_the_tree():
    plan = route(torch.tensor([2, 0, -1, 2]), 3)
    outputs = [
        {
            "logits": torch.full((n, 2), float(b)),
            "aux": (torch.full((n,), b), [torch.ones(n, 1) * b]),
        }
        for b, n in enumerate(plan.counts)
    ]
    outputs[1] = None
    result = combine(plan, outputs)
    aux, (last,) = result["aux"]
    assert type(result["aux"]) is tuple
    assert result["logits"].tolist() == [[2, 2], [0, 0], [0, 0], [2, 2]]
    assert aux.tolist() == [2, 0, 0, 2]
    assert last.tolist() == [[2], [0], [0], [2]]


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_results_never_alias_the_inputs(rows):
    """A branch may change its rows in place, even where it got the whole batch."""
    x = torch.randn(rows, 3)
    before = x.clone()
    plan = route(torch.zeros(rows, dtype=torch.int64), 1)
    (part,) = gather(plan, x)
    part.fill_(7.0)
    result = combine(plan, [part])
    result.fill_(9.0)
    assert torch.equal(x, before)
    assert torch.equal(part, torch.full((rows, 3), 7.0))


def test_one_plan_serves_the_gather_of_its_own_combine():
    """gather(combine(y)) gives y back, and a plan can be used any number of times."""
    plan = route(random_selection(100, 1, 4, holes=0.0), 4)
    outputs = [torch.randn(n, 3) for n in plan.counts]
    for _ in range(3):
        for y, again in zip(outputs, gather(plan, combine(plan, outputs)), strict=True):
            assert torch.equal(y, again)


def combine_three(outputs, weights=None, selection=(0, 1, 1)):
    return combine(route(torch.tensor(selection), 3), outputs, weights)


def rows_for(*sizes, width=2):
    return [torch.zeros(n, width) for n in sizes]


REFUSED = {
    "too few branches": (lambda: combine_three(rows_for(1, 2)), "one output per branch, 3; got 2"),
    "too many branches": (
        lambda: combine_three(rows_for(1, 2, 0, 0)),
        "one output per branch, 3; got 4",
    ),
    "too few rows": (lambda: combine_three(rows_for(1, 1, 0)), "^branch 1: .* must have 2 rows"),
    "too many rows": (
        lambda: combine_three(rows_for(1, 2, 5)),
        r"^branch 2: .* 0 rows.* got shape \[5, 2\]",
    ),
    "None for rows": (
        lambda: combine_three([torch.zeros(1, 2), None, None]),
        "branch 1 has 2 rows but no output",
    ),
    "other row shape": (
        lambda: combine_three([torch.zeros(1, 2), torch.zeros(2, 3), None]),
        r"^branch 1: .* rows of shape \[3\]",
    ),
    "other tree": (
        lambda: combine_three([torch.zeros(1, 2), [torch.zeros(2, 2)], None]),
        "^branch 1 returns another structure",
    ),
    "other keys": (
        lambda: combine_three([{"a": torch.zeros(1, 2)}, {"b": torch.zeros(2, 2)}, None]),
        "^branch 1 returns another structure",
    ),
    "weights of other rows": (
        lambda: combine_three(rows_for(1, 2, 0), torch.ones(4)),
        r"weights must have shape .* got \[4",
    ),
    "weights of other ranks": (
        lambda: combine_three(rows_for(1, 2, 0), torch.ones(3, 2)),
        r"weights must have shape .* got \[3, 2\]",
    ),
    "flat weights for two ranks": (
        lambda: combine_three(rows_for(1, 2, 0), torch.ones(3), [[0, 1], [1, -1], [-1, -1]]),
        r"weights must have shape .* \[3, 2\]; got \[3\]",
    ),
    "integer weights": (
        lambda: combine_three(rows_for(1, 2, 0), torch.ones(3, 1, dtype=torch.int64)),
        r"weights must be floating; got torch\.int64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_combine_refuses(name):
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="abacus"), dynmm_kernels.backend("abacus"):
        pass


def test_memory_asked_for_by_the_package_is_poisoned():
    package, other = {"__name__": "dynmm_kernels.somewhere"}, {"__name__": "elsewhere"}
    code = "import torch\nmade = [torch.empty(3), torch.ones(2, dtype=torch.int32).new_empty(2)]"
    exec(code, package)
    floats, ints = package["made"]
    assert floats.isnan().all()
    assert ints.tolist() == [0x7F7F7F7F] * 2
    exec("import torch\nmade = torch.empty(3).fill_(1)", other)
    assert other["made"].tolist() == [1, 1, 1]
