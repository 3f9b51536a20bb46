"""On a GPU: every backend against the reference on the CPU, and what only a GPU shows.

Skipped where torch sees none.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from tensors import (
    DTYPES,
    FLOATS,
    LAYOUTS,
    SELECTIONS,
    random_bits,
    random_selection,
    random_values,
    row_bytes,
    selection_of,
)
from torch import Tensor, nn

import dynmm_kernels
from dynmm_kernels import RoutedFusion, ops, route

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

ROWS = (0, 1, 2, 31, 32, 33, 1023, 1024, 1025, 16384, 16385, 65537)


@pytest.fixture(params=["reference", "cuda", "triton"])
def backend(request) -> Iterator[str]:
    with dynmm_kernels.backend(request.param):
        yield request.param


def on_cpu(op: str, *arguments):
    with dynmm_kernels.backend("reference"):
        return getattr(ops.kernels(), op)(*arguments)


def on_gpu(op: str, *arguments):
    return getattr(ops.kernels(), op)(*map(to_gpu, arguments))


def to_gpu(argument):
    if isinstance(argument, Tensor):
        return on_device(argument)
    if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
        return [on_device(tensor) for tensor in argument]
    return argument


def on_device(tensor: Tensor) -> Tensor:
    """The tensor on the GPU with the strides it has."""
    if tensor.numel() == 0:
        return tensor.cuda()
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    flat = tensor.as_strided((reach,), (1,), tensor.storage_offset())
    return flat.cuda().as_strided(tensor.shape, tensor.stride())


def assert_same(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert row_bytes(got.cpu().reshape(1, -1)) == row_bytes(wanted.reshape(1, -1))


@pytest.mark.parametrize("branches", [1, 2, 8, 256])
@pytest.mark.parametrize("rows", ROWS)
def test_route(backend, rows, branches):
    for selection in (
        torch.randint(-1, branches, (rows,)),
        random_selection(rows, 2, branches).int(),
        torch.rand(rows, min(branches, 8)) < 0.3,
    ):
        width = selection.shape[1] if selection.dtype == torch.bool else branches
        for got, wanted in zip(
            on_gpu("route", selection, width), on_cpu("route", selection, width), strict=True
        ):
            assert_same(got, wanted)


def test_route_large(backend):
    selection = torch.randint(-1, 256, (1_000_003,))
    for got, wanted in zip(
        on_gpu("route", selection, 256), on_cpu("route", selection, 256), strict=True
    ):
        assert_same(got, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [0, 1, 33, 1025, 20000])
def test_route_argmax(backend, dtype, rows):
    logits = torch.randn(rows, 5).to(dtype)
    logits[::3] = logits[::3].round()  # ties
    for faulty, value in ((7, float("nan")), (20, float("inf")), (21, float("-inf"))):
        if faulty < rows:
            logits[faulty] = value
    for got, wanted in zip(
        on_gpu("route_argmax", logits), on_cpu("route_argmax", logits), strict=True
    ):
        assert_same(got, wanted)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_movement(backend, name, layout):
    selection, branches = selection_of(name)
    order, inverse, header = on_cpu("route", selection, branches)
    starts, ranks = header.tolist()[: branches + 1], inverse.shape[1]
    for dtype in DTYPES:
        if layout == "misaligned" and dtype.itemsize > 1:
            continue  # CUDA has no values across alignment
        source = LAYOUTS[layout](random_bits((inverse.shape[0], 3, 5), dtype))
        arguments = ([source] * branches, starts[:-1], starts[1:], order, ranks)
        gathered = on_cpu("gather_rows", *arguments)
        for got, wanted in zip(on_gpu("gather_rows", *arguments), gathered, strict=True):
            assert_same(got, wanted)
        if ranks == 1:
            arguments = (gathered, starts[:-1], inverse)
            assert_same(on_gpu("combine_rows", *arguments), on_cpu("combine_rows", *arguments))


@pytest.mark.parametrize("numel", [1, 3, 8, 1024, 40_000])
@pytest.mark.parametrize("rows", [1, 33, 1025])
def test_sizes(backend, rows, numel):
    """Several modalities in one call: wide rows, rows of a few bytes, more than one tile a row."""
    if rows * numel > 4_000_000:
        pytest.skip("more memory than the case is worth")
    order, inverse, header = on_cpu("route", torch.randint(0, 3, (rows,)), 3)
    starts = header.tolist()[:4]
    sources = [random_bits((rows, numel), dtype) for dtype in (torch.float32, torch.uint8)]
    arguments = (sources, [0, 0], [rows, rows], order, 1)
    for got, wanted in zip(
        on_gpu("gather_rows", *arguments), on_cpu("gather_rows", *arguments), strict=True
    ):
        assert_same(got, wanted)
    outputs = [random_bits((starts[b + 1] - starts[b], numel), torch.float16) for b in range(3)]
    arguments = (outputs, starts[:-1], inverse)
    assert_same(on_gpu("combine_rows", *arguments), on_cpu("combine_rows", *arguments))


@pytest.mark.parametrize("numel", [1, 3, 64, 70_000])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_arithmetic(backend, dtype, numel):
    """Within the error of one rounding per operation, relative to the scale of the result."""
    rows, branches = 37, 3
    order, inverse, header = on_cpu("route", random_selection(rows, 2, branches), branches)
    starts = header.tolist()[: branches + 1]
    real = torch.float32 if dtype.is_complex else dtype
    make: Callable[[int], Tensor] = lambda n: random_values((n, numel), real).to(dtype)  # noqa: E731
    weights = torch.randn(rows, 2, dtype=ops.weight_dtype(dtype))
    source, outputs = make(rows), [make(starts[b + 1] - starts[b]) for b in range(branches)]
    calls = {
        "gather_rows": ([source], [0], [starts[-1]], order, 2, weights),
        "combine_rows": (outputs, starts[:-1], inverse, weights),
        "row_dots": (source, outputs, starts[:-1], inverse),
    }
    for op, arguments in calls.items():
        got, wanted = on_gpu(op, *arguments), on_cpu(op, *arguments)
        if op == "gather_rows":
            got, wanted = got[0], wanted[0]
        eps = torch.finfo(got.dtype).eps
        scale = wanted.abs().max() * (numel**0.5 if op == "row_dots" else 4)
        torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=float(scale) * 4 * eps)


def test_many_outputs(backend):
    """More outputs than a small table of kernel parameters holds."""
    branches = 300
    selection = torch.randint(0, branches, (2000,))
    order, inverse, header = on_cpu("route", selection, branches)
    starts = header.tolist()[: branches + 1]
    source = random_bits((2000, 24), torch.float32)
    arguments = ([source] * branches, starts[:-1], starts[1:], order, 1)
    gathered = on_cpu("gather_rows", *arguments)
    for got, wanted in zip(on_gpu("gather_rows", *arguments), gathered, strict=True):
        assert_same(got, wanted)
    assert_same(on_gpu("combine_rows", gathered, starts[:-1], inverse), source)


def make_fusion(**options) -> RoutedFusion:
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)) for _ in range(3)]
    return RoutedFusion(nn.Linear(16, 3), branches, **options).cuda().double()


@pytest.mark.parametrize("gate_grad", ["straight_through", "selected"])
def test_fusion_equals_masked(backend, gate_grad):
    x = torch.randn(65, 16, dtype=torch.float64, device="cuda")
    results = []
    for execution in ("masked", "routed"):
        fusion = make_fusion(execution=execution, gate_grad=gate_grad)
        own = x.clone().requires_grad_()
        out = fusion(own)
        (out * out).sum().backward()
        results.append([out, own.grad, *[p.grad for p in fusion.parameters()]])
    for masked, routed in zip(*results, strict=True):
        torch.testing.assert_close(routed, masked, rtol=1e-10, atol=1e-10)


def test_one_synchronisation(monkeypatch):
    """No hidden one (torch would raise), and one wait for the counts; none for a plan in use."""
    waits = []
    wait = torch.cuda.Event.synchronize
    monkeypatch.setattr(
        torch.cuda.Event, "synchronize", lambda event: (waits.append(1), wait(event))[1]
    )
    fusion, x = make_fusion(execution="routed"), torch.randn(64, 16).double().cuda()
    for step in (fusion.eval(), fusion.train()):
        step(x)
        waits.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, routing = step(x, return_routing=True)
            assert len(waits) == 1
            dynmm_kernels.combine(routing.plan, dynmm_kernels.gather(routing.plan, x))
            assert len(waits) == 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
        del out


def test_same_bits_every_time():
    x = torch.randn(257, 16, device="cuda").double()
    fusion = make_fusion(execution="routed")
    first, stream = None, torch.cuda.Stream()
    for attempt in range(1000):
        fusion.zero_grad()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if attempt % 2 else torch.cuda.current_stream()):
            out = fusion(x)
            out.sum().backward()
        torch.cuda.current_stream().wait_stream(stream)
        got = torch.cat([out.flatten(), *[p.grad.flatten() for p in fusion.parameters()]])
        first = got if first is None else first
        assert torch.equal(got, first), f"attempt {attempt}"


def test_graph_replay():
    """A captured plan and its movement follow new data when they are replayed."""
    choice = torch.zeros(4096, dtype=torch.int64, device="cuda")
    x = torch.randn(4096, 8, device="cuda")
    kernels = ops.kernels()

    def run():
        order, inverse, header = kernels.route(choice, 4)
        (rows,) = kernels.gather_rows([x], [0], [4096], order, 1)
        return rows, kernels.combine_rows([rows], [0], inverse), header

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, back, header = run()
    for _ in range(3):
        choice.copy_(torch.randint(0, 4, (4096,)))
        x.normal_()
        graph.replay()
        order, _, wanted = on_cpu("route", choice.cpu(), 4)
        assert_same(header, wanted)
        assert_same(rows, x.cpu()[order.long()])
        assert_same(back, x.cpu())


def test_faults_are_clear_errors(backend):
    plan = route(torch.tensor([0, 5, 1], device="cuda"), 2)
    with pytest.raises(ValueError, match=r"choice must be in 0\.\.1.*got 5 in row 1"):
        _ = plan.counts
    fusion = make_fusion().eval()
    x = torch.randn(8, 16, device="cuda").double()
    x[3] = float("nan")
    with pytest.raises(ValueError, match="row 3"), torch.no_grad():
        fusion(x)
    x[3] = 0
    assert fusion(x).isfinite().all()  # no sticky error is left behind
