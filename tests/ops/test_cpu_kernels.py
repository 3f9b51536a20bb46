"""What the C++ kernels do that no other backend does: parts for threads, blocks, spans, copies."""

import itertools
from collections.abc import Iterator

import kernel_cases as cases
import pytest
import torch
from conftest import WITHOUT_COMPILER
from tensors import (
    FLOATS,
    LAYOUTS,
    SELECTIONS,
    random_bits,
    random_selection,
    random_values,
    wider_table,
)

import dynmm_kernels
from dynmm_kernels import ops

pytestmark = pytest.mark.skipif(WITHOUT_COMPILER, reason="built without a compiler")


@pytest.fixture(autouse=True)
def on_cpu_kernels() -> Iterator[None]:
    with dynmm_kernels.backend("cpu"):
        yield


def run(op: str, *arguments):
    return getattr(ops.kernels(), op)(*arguments)


@pytest.fixture(params=[1, 3], ids=lambda threads: f"{threads} threads")
def threads(request, restored_threads) -> None:
    torch.set_num_threads(request.param)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_fewer_rows_than_threads(rows, threads):
    """Moves that are worth several threads, each of fewer rows than there are threads."""
    sources = [random_values((rows, 60_000), torch.float32) for _ in range(6)]
    order = torch.arange(rows, dtype=torch.int32).flip(0)
    gathered = run("gather_rows", sources, [0] * 6, [rows] * 6, order, 1, None)
    for got, source in zip(gathered, sources, strict=True):
        cases.assert_same(got, source.flip(0))


@pytest.mark.parametrize("rows", [1000, 3 * 16384 - 1, 65_537])
@pytest.mark.parametrize("branches", [1, 2, 17])
def test_route_in_parts(rows, branches, threads):
    """Parts of threads, each with counters of its own."""
    cases.check_route(run, rows, branches)
    cases.check_faults(run, rows)


@pytest.mark.parametrize("numel", range(70))
def test_rows_of_few_bytes(numel):
    """Copied without a call, in words of which the last may reach back; nothing behind them."""
    rows, branches = 41, 3
    order, inverse, header = run("route", torch.randint(-1, branches, (rows,)), branches)
    starts = header.tolist()[: branches + 1]
    for arranged in (lambda tensor: tensor, wider_table):
        source = arranged(random_bits((rows, numel), torch.uint8))
        arguments = ([source] * branches, starts[:-1], starts[1:], order, 1, None)
        cases.check_moves(run, "gather_rows", *arguments)
        outputs = [arranged(part) for part in run("gather_rows", *arguments)]
        for given in cases.GIVEN:
            arguments = outputs[given], starts[:-1][given], inverse, None
            cases.check_moves(run, "combine_rows", *arguments)


@pytest.mark.parametrize("numel", [511, 512, 600, 1025])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_long_rows(numel, weighted, threads):
    """Longer than what is accumulated at a time."""
    rows, branches = 40, 3
    _, inverse, header = run("route", random_selection(rows, 2, branches), branches)
    starts = header.tolist()[: branches + 1]
    outputs = [
        random_values((stop - start, numel), torch.float64)
        for start, stop in itertools.pairwise(starts)
    ]
    weights = torch.rand(rows, 2, dtype=torch.float64) if weighted else None
    got = run("combine_rows", outputs, starts[:-1], inverse, weights)
    pool, wanted = torch.cat(outputs), torch.zeros(rows, numel, dtype=torch.float64)
    for n, slots in enumerate(inverse.tolist()):
        for j, slot in enumerate(slots):
            if slot >= 0:
                wanted[n] += pool[slot] * (1 if weights is None else weights[n, j])
    cases.assert_same(got, wanted)


@pytest.mark.parametrize("channels", [256, 257, 300, 600])
def test_sums_of_many_channels_last(channels, threads):
    """More channels than are summed at a time."""
    shape = (2, channels, 3, 3)
    grad, main, aux = (
        random_values(shape, torch.float64).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    means = run("se_add_means", main)
    torch.testing.assert_close(means, main.mean((2, 3)), rtol=1e-14, atol=1e-14)
    for got, other in zip(run("se_add_dots", grad, main, aux), (main, aux), strict=True):
        torch.testing.assert_close(got, (grad * other).sum((2, 3)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_long_sums_are_accurate(memory_format):
    """A quarter of a million terms in fp32, to the last bits."""
    maps = torch.full((1, 4, 512, 512), 1 / 3).contiguous(memory_format=memory_format)
    third, eps = float(maps.flatten()[0]), torch.finfo(torch.float32).eps
    means = run("se_add_means", maps)
    torch.testing.assert_close(means, torch.full((1, 4), third), rtol=2 * eps, atol=0)
    wanted = torch.full((1, 4), third * third * 512 * 512)
    for dots in run("se_add_dots", maps, maps, maps):
        torch.testing.assert_close(dots, wanted, rtol=2 * eps, atol=0)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_movement(name, layout):
    """Also of some of the outputs: the slots of the others hold no row."""
    cases.check_movement(run, name, layout)


@pytest.mark.parametrize("numel", [1, 3, 64, 600])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_arithmetic(dtype, numel):
    cases.check_arithmetic(run, dtype, numel)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("numel", [1, 16, 64, 600])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_entries_outside(dtype, numel, ranks):
    cases.check_entries(run, dtype, numel, ranks)


@pytest.mark.parametrize(
    ("rows", "classes", "modalities"),
    [
        *((1, 1, 1), (33, 3, 3), (33, 10, 2), (1, 10, 8), (33, 32, 1)),
        *((33, 33, 3), (33, 101, 2), (3, 1100, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_energy_fuse(dtype, rows, classes, modalities):
    """Lanes as rows or as classes, whole and in part; one strip of vectors or two."""
    cases.check_energy_fuse(run, dtype, rows, classes, modalities)


def test_energies_of_infinite_logits():
    """As torch.logsumexp has them, in either layout of the lanes."""
    inf, nan = torch.inf, torch.nan
    heads = [
        [-inf, -inf],
        [inf, 0.0],
        [inf, -inf],
        [nan, inf],
        [nan, 0.0],
        [-inf, 3e38],
        [inf, inf],
    ]
    for classes, dtype in itertools.product((2, 5, 40, 1100), (torch.float32, torch.float64)):
        logits = torch.full((len(heads), classes), -inf, dtype=dtype)
        logits[:, classes - 2 :] = torch.tensor(heads, dtype=dtype)
        _, _, _, got = run("energy_fuse", [logits], None, None, None, 2, 1.0)
        torch.testing.assert_close(got[:, 0], logits.logsumexp(1), equal_nan=True)


def copies_made(call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")


SLICES = {
    "of every line": lambda table: table[:, :, 1:5],
    "one of every line": lambda table: table[..., 3],
    "lines": lambda table: table[:, 1:3, 2],
    "every other line": lambda table: table[:, ::2, :4],
    "every other value": lambda table: table[:, 1, ::2],
    "of every second sample": lambda table: table[::2, :, 1:],
    "of more dimensions": lambda table: table.view(-1, 3, 2, 1, 9)[..., 2:7],
    "a line again": lambda table: table[:, :1, 2:4].expand(-1, 5, -1),
    "a value again": lambda table: table[:, :1, :1].expand(-1, 5, 3),
    "lines of one sample": lambda table: table[:1, :, 1:3].expand(4, -1, -1),
    "nothing of every line": lambda table: table[:, :, 5:5],
    "of no sample": lambda table: table[:0, :, 1:5],
}


@pytest.mark.parametrize("slice_of", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex128])
def test_slices_are_moved_as_they_lie(slice_of, dtype, threads):
    source = slice_of(random_bits((40, 6, 9), dtype))
    order = torch.tensor([3, 0, -1, 2, 39, 1], dtype=torch.int32)
    arguments = [source, source], [0, 2], [4, 6], order, 1, None
    cases.check_moves(run, "gather_rows", *arguments)
    assert copies_made(lambda: run("gather_rows", *arguments)) == 0


def test_large_slices_by_many_threads(threads):
    packed = torch.randn(67, 50, 409)
    sources = [packed[..., :300], packed[..., 300:374], packed[..., 374:]]
    order = torch.randperm(67).int()
    gathered = run("gather_rows", sources, [0, 5, 7], [67, 66, 8], order, 1, None)
    for got, source, part in zip(gathered, sources, (order, order[5:66], order[7:8]), strict=True):
        cases.assert_same(got, source[part.long()])
        assert got.is_contiguous()


def test_a_source_with_holes_is_copied_once():
    """However many branches read it; another tensor at the same address has a copy of its own."""
    table = torch.randn(4, 6, 9).mT
    narrow, wide, turned = table[:, 1:5], table[:, 1:7], table.mT[:, :4, 1:7].mT[..., :3]
    bits = narrow.view(torch.int32)
    sources = [narrow, wide, narrow, turned, bits, wide, narrow[:3]] * 2
    order = torch.tensor([2, 0, 1, 2], dtype=torch.int32)
    arguments = (sources, [0] * len(sources), [4] * len(sources), order, 1, None)
    for got, source in zip(run("gather_rows", *arguments), sources, strict=True):
        cases.assert_same(got, source[order.long()])
    assert copies_made(lambda: run("gather_rows", *arguments)) == 5


def test_rows_with_holes_are_copied_once_for_the_dots():
    """As the expanded gradient of a sum, which may stand on both sides."""
    rows = torch.randn(3, 1).expand(3, 8)
    inverse = torch.arange(3, dtype=torch.int32).unsqueeze(1)
    arguments = (rows, [rows, rows], [0, 3], inverse)
    (dots,) = run("row_dots", *arguments).unbind(1)
    torch.testing.assert_close(dots, rows.square().sum(1))
    assert copies_made(lambda: run("row_dots", *arguments)) == 1


@pytest.mark.parametrize(
    ("op", "arguments", "text"),
    [
        (
            "route",
            (torch.zeros(3, dtype=torch.int64), 2**40),
            f"route: num_branches must be in 1..{2**20}; got {2**40}",
        ),
        (
            "route_argmax",
            (torch.zeros(3, 2, dtype=torch.complex64),),
            "route_argmax: logits must be float64, float32, float16 or bfloat16 [N, B>=1]; "
            "got complex64 [3, 2]",
        ),
        (
            "combine_rows",
            ([torch.zeros(2, 2)], [2**63 - 1], torch.zeros(1, 1, dtype=torch.int32), None),
            f"combine_rows: output 0 must end at slot {2**31 - 1} or before; got {2**63 + 1}",
        ),
    ],
)
def test_words_arrive_as_they_are(op, arguments, text):
    """No function, no file, no "a call to torch failed" before or behind them."""
    with pytest.raises(RuntimeError) as refusal:
        run(op, *arguments)
    assert str(refusal.value) == text
