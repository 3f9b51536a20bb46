"""On a GPU: every backend against the reference on the CPU, and what only a GPU shows.

Skipped where torch sees none.
"""

from collections.abc import Iterator

import kernel_cases as cases
import pytest
import torch
from tensors import FLOATS, LAYOUTS, SELECTIONS
from torch import Tensor, nn

import dynmm_kernels
from dynmm_kernels import NestedFusion, RoutedFusion, ops, resource_loss, route
from dynmm_kernels.nn import SEAdd, Usage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(params=["reference", "cuda", "triton"])
def backend(request) -> Iterator[str]:
    with dynmm_kernels.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def filled_memory() -> Iterator[None]:
    """On CUDA torch then fills what `empty` gives, to C++ as well, with NaN or the largest integer.

    `warn_only`, for cuBLAS and some of torch's own backward passes refuse to run otherwise.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(op: str, *arguments):
    """The op on GPU copies of the arguments."""
    return getattr(ops.kernels(), op)(*map(to_gpu, arguments))


def to_gpu(argument):
    if isinstance(argument, Tensor):
        return on_device(argument)
    if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
        return [on_device(tensor) for tensor in argument]
    return argument


def on_device(tensor: Tensor) -> Tensor:
    """The tensor on the GPU with the strides and the alignment it has."""
    if tensor.numel() == 0:
        return tensor.cuda()
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    offset = tensor.storage_offset()
    storage = tensor.as_strided((offset + reach,), (1,), 0).cuda()
    return storage.as_strided(tensor.shape, tensor.stride(), offset)


@pytest.mark.parametrize("op", ops.schemas.OPS)
def test_good_calls(backend, op):
    cases.check_good_calls(run, op)


@pytest.mark.parametrize("branches", [1, 2, 8, 256])
@pytest.mark.parametrize("rows", cases.ROWS)
def test_route(backend, rows, branches):
    cases.check_route(run, rows, branches)


def test_route_large(backend):
    cases.check_moves(run, "route", torch.randint(-1, 256, (1_000_003,)), 256)


@pytest.mark.parametrize("rows", [1, 33, 1025, 20_000])
def test_faults(backend, rows):
    cases.check_faults(run, rows)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [0, 1, 33, 1025, 20_000])
def test_route_argmax(backend, dtype, rows):
    cases.check_argmax(run, dtype, rows)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_movement(backend, name, layout):
    cases.check_movement(run, name, layout)


@pytest.mark.parametrize("numel", cases.NUMELS)
@pytest.mark.parametrize("rows", [1, 33, 100])
def test_sizes(backend, rows, numel):
    cases.check_sizes(run, rows, numel)


@pytest.mark.parametrize("numel", [1, 3, 64, 2100, 70_000])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_arithmetic(backend, dtype, numel):
    cases.check_arithmetic(run, dtype, numel)


@pytest.mark.parametrize(("shape", "channels_last"), cases.MAPS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_se_add(backend, dtype, shape, channels_last):
    for active in {0, min(1, shape[0]), shape[0]}:
        cases.check_se_add(run, dtype, shape, channels_last, active)


@pytest.mark.parametrize(("rows", "classes", "modalities"), cases.ENERGIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_energy_fuse(backend, dtype, rows, classes, modalities):
    cases.check_energy_fuse(run, dtype, rows, classes, modalities)


def test_many_outputs(backend):
    cases.check_many_outputs(run, 300)


def make_fusion(**options) -> RoutedFusion:
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)) for _ in range(3)]
    return RoutedFusion(nn.Linear(16, 3), branches, **options).cuda().double()


@pytest.mark.parametrize("select", [1, 2, "multi_hot"])
@pytest.mark.parametrize("gate_grad", ["straight_through", "selected"])
def test_fusion_equals_masked(backend, gate_grad, select):
    x = torch.randn(65, 16, dtype=torch.float64, device="cuda")
    results = []
    for execution in ("masked", "routed"):
        fusion = make_fusion(execution=execution, gate_grad=gate_grad, select=select)
        own = x.clone().requires_grad_()
        out = fusion(own)
        (out * out).sum().backward()
        results.append([out, own.grad, *[p.grad for p in fusion.parameters()]])
    for masked, routed in zip(*results, strict=True):
        torch.testing.assert_close(routed, masked, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nested_equals_masked(backend, memory_format):
    torch.manual_seed(0)
    stages = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)]
    fusions = [SEAdd(8, reduction=2) for _ in range(3)]
    nested = NestedFusion(nn.Identity(), stages[:3], stages[3:], fusions).cuda().double()
    inputs = [torch.randn(9, 8, 5, 7).double().cuda() for _ in range(2)]
    depth = torch.tensor([0, 3, 2, 2, 0, 1, 3, 0, 3], device="cuda")
    results = []
    for nested.execution in ("masked", "routed"):
        nested.zero_grad()
        own = [x.to(memory_format=memory_format).detach().requires_grad_() for x in inputs]
        out = nested(*own, depth=depth)
        (out * out).sum().backward()
        results.append([out, *[x.grad for x in own], *[p.grad for p in nested.parameters()]])
    for masked, routed in zip(*results, strict=True):
        torch.testing.assert_close(routed, masked, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_one_synchronisation(training, monkeypatch):
    """No hidden one (torch would raise), and one wait for the counts; none for a plan in use."""
    waits = []
    wait = torch.cuda.Event.synchronize
    monkeypatch.setattr(
        torch.cuda.Event, "synchronize", lambda event: (waits.append(1), wait(event))[1]
    )
    fusion, x = make_fusion().train(training), torch.randn(64, 16).double().cuda()
    usage = Usage()
    with torch.set_grad_enabled(training):
        fusion(x)
        waits.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fusion(x)  # in eval the short way
            assert len(waits) == 1
            waits.clear()
            out, routing = fusion(x, return_routing=True)
            assert len(waits) == 1
            dynmm_kernels.combine(routing.plan, dynmm_kernels.gather(routing.plan, x))
            assert len(waits) == 1
            usage.add(routing)
            resource_loss(routing, costs=[1e9, 2e9, 3e9])
            assert len(waits) == 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
        del out


def test_random_choices_are_those_of_the_cpu():
    """Drawn on the host, unless the generator is one of the GPU."""
    x = torch.randn(64, 16).double()
    fusion, choices = make_fusion(), []
    for device in ("cpu", "cuda"):
        fusion.to(device)
        for generator in (torch.Generator().manual_seed(1), None):
            torch.manual_seed(1)
            options = {"choice": "random", "generator": generator, "return_routing": True}
            routing = fusion(x.to(device), **options)[1]
            assert routing.choice.device.type == device
            choices.append(routing.choice.cpu())
            assert routing.counts == tuple(choices[-1].bincount(minlength=3).tolist())
    for other in choices[1:]:
        assert torch.equal(other, choices[0])
    there = torch.Generator("cuda").manual_seed(1)
    routing = fusion(x.cuda(), choice="random", generator=there, return_routing=True)[1]
    assert sum(routing.counts) == 64


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
        order, _, wanted = cases.reference("route", choice.cpu(), 4)
        cases.assert_same(header, wanted)
        cases.assert_same(rows, x.cpu()[order.long()])
        cases.assert_same(back, x.cpu())


class OnCpu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cpu()


@pytest.mark.parametrize("forced", [None, 1], ids=["gate", "all to it"])
@pytest.mark.parametrize("training", [True, False])
def test_an_output_on_the_cpu_is_named(backend, training, forced):
    """No kernel is handed a pointer to host memory."""
    fusion = make_fusion(execution="routed").train(training)
    fusion.branches[1].module.append(OnCpu())
    x = torch.randn(65, 16, dtype=torch.float64, device="cuda")
    message = r"branch '1'.* on cpu.* on cuda"
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=message):
        fusion(x, choice=forced)


def test_weights_on_the_cpu_are_named(backend):
    plan = route(torch.tensor([0, 1, 0], device="cuda"), 2)
    rows = [torch.ones(n, 4, device="cuda") for n in plan.counts]
    with pytest.raises(ValueError, match=r"on cuda.* weights are on cpu"):
        dynmm_kernels.combine(plan, rows, torch.ones(3))


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
