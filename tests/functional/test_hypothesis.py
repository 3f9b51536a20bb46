"""Generated plans and rows, more than ten thousand of them, each on every CPU backend."""

from collections.abc import Callable
from itertools import pairwise, product

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensors import (
    DTYPES,
    INTEGERS,
    LAYOUTS,
    oracle_plan,
    random_bits,
    random_values,
    row_bytes,
    row_values,
    zero_bytes,
)

import dynmm_kernels
from dynmm_kernels import combine, gather, route

CASES = {"plans": 4000, "moves": 4000, "sums": 2500}
# Few draws make a case cheap: what does not shrink well is drawn at once, from all combinations.
SELECTION_FORMS = [
    (num_branches, dtype, ranks, transposed)
    for num_branches in range(1, 7)
    for dtype in (torch.int64, torch.int32, torch.int8, torch.bool)
    for ranks in ((num_branches,) if dtype is torch.bool else (None, 1, 2, 3))  # None: [N]
    for transposed in (False, True)
]
ROW_SHAPES = [(), (1,), (3,), (2, 3), (0,)]
MOVED_ROWS = list(product(DTYPES, ROW_SHAPES, [None, *LAYOUTS]))
SUMMED_ROWS = list(product([torch.float64, torch.float32, *INTEGERS], ROW_SHAPES))
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def selections(draw) -> tuple[torch.Tensor, int]:
    """A choice [N], ranked choices [N, k] or a mask [N, B], in some dtype and layout."""
    num_branches, dtype, ranks, transposed = draw(st.sampled_from(SELECTION_FORMS))
    rows = draw(st.integers(0, 12))
    size = rows * (ranks or 1)
    drawn = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.int64)
    values = drawn % 2 if dtype is torch.bool else drawn % (num_branches + 1) - 1
    table = values.to(dtype).reshape(rows, ranks or 1)
    if transposed:
        table = table.t().contiguous().t()
    return (table[:, 0] if ranks is None else table), num_branches


def run_generated(check: Callable, cases: int, capsys, **strategies: st.SearchStrategy) -> None:
    """Runs `check` on `cases` generated cases, and says and verifies how many there were."""
    generated = 0

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(**strategies)
    def run(**values):
        nonlocal generated
        check(**values)
        generated += 1

    run()
    with capsys.disabled():
        print(f"\n{check.__name__}: {generated} generated cases")
    assert generated >= cases


def test_ten_thousand_cases():
    assert sum(CASES.values()) >= 10_000


def test_plans(backends, capsys):
    def check_plans(routed):
        selection, num_branches = routed
        expected = oracle_plan(selection, num_branches)
        for name in backends:
            with dynmm_kernels.backend(name):
                plan = route(selection, num_branches)
            order, inverse = plan.order.tolist(), plan.inverse.tolist()
            assert order == expected.order
            assert inverse == expected.inverse
            assert plan.offsets.tolist() == list(plan.starts) == expected.offsets
            assert sum(plan.counts) == plan.starts[-1]
            taken = order[: plan.starts[-1]]
            assert len(set(taken)) == len(taken)
            entries = [slot for slots in inverse for slot in slots]
            assert [entries[entry] for entry in taken] == list(range(len(taken)))

    run_generated(check_plans, CASES["plans"], capsys, routed=selections())


def test_moves(backends, capsys):
    """gather along any plan; combine of what it gave, of one rank, is the rows or zeros."""

    def check_moves(routed, moved_rows, seed):
        (selection, num_branches), (dtype, row_shape, layout) = routed, moved_rows
        torch.default_generator.manual_seed(seed)
        x = random_bits((selection.shape[0], *row_shape), dtype)
        if layout is not None and x.numel() > 0 and x.dim() > 1:
            x = LAYOUTS[layout](x)
        expected = oracle_plan(selection, num_branches)
        rows = oracle.gather(row_bytes(x), expected)
        for name in backends:
            with dynmm_kernels.backend(name):
                plan = route(selection, num_branches)
                parts = gather(plan, x)
                assert [row_bytes(part) for part in parts] == rows
                if expected.ranks == 1:
                    moved = oracle.combine(rows, expected, zero_bytes(x))
                    assert row_bytes(combine(plan, parts)) == moved

    run_generated(
        check_moves,
        CASES["moves"],
        capsys,
        routed=selections(),
        moved_rows=st.sampled_from(MOVED_ROWS),
        seed=SEEDS,
    )


def test_sums(backends, capsys):
    """Unweighted top-k combine, bit for bit: integers exactly, fp32 and fp64 in rank order."""

    def check_sums(routed, summed_rows, seed, none_for_starved):
        (selection, num_branches), (dtype, row_shape) = routed, summed_rows
        torch.default_generator.manual_seed(seed)
        expected = oracle_plan(selection, num_branches)
        sizes = [stop - start for start, stop in pairwise(expected.offsets)]
        outputs = [random_values((size, *row_shape), dtype) for size in sizes]
        zero = [0] * torch.Size(row_shape).numel()
        cast = oracle.fp32 if dtype is torch.float32 else lambda v: v
        rows = oracle.combine([row_values(y) for y in outputs], expected, zero, cast=cast)
        wanted = torch.tensor(rows, dtype=dtype).reshape(len(selection), *row_shape)
        if none_for_starved and any(sizes):
            outputs = [y if len(y) else None for y in outputs]
        for name in backends:
            with dynmm_kernels.backend(name):
                result = combine(route(selection, num_branches), outputs)
            assert result.dtype == dtype
            assert torch.equal(result, wanted)

    run_generated(
        check_sums,
        CASES["sums"],
        capsys,
        routed=selections(),
        summed_rows=st.sampled_from(SUMMED_ROWS),
        seed=SEEDS,
        none_for_starved=st.booleans(),
    )


@pytest.mark.usefixtures("backend")
def test_values_out_of_range_are_never_accepted(capsys):
    def check_out_of_range(routed, value, position):
        selection, num_branches = routed
        if selection.numel() == 0 or selection.dtype is torch.bool:
            return
        flat = selection.long().flatten().clone()
        entry = position % len(flat)
        flat[entry] = value if value < -1 else value + num_branches
        row = entry // (len(flat) // len(selection))
        with pytest.raises(ValueError, match=rf"\b{row}\b"):
            route(flat.reshape(selection.shape), num_branches)

    values = st.integers(-(2**63), -2) | st.integers(0, 2**62)
    run_generated(
        check_out_of_range,
        300,
        capsys,
        routed=selections(),
        value=values,
        position=st.integers(0, 99),
    )
