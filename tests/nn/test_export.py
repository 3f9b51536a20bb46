"""torch.export, ONNX, meta and fake tensors, and tracers that keep the decisions of a batch."""

from contextlib import nullcontext

import pytest
import torch
from compiling import BRANCHES, N, batches, modalities, simple, splits, unlike
from models import FEATURES, mlp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from dynmm_kernels import CascadeFusion, EnergyFusion, RoutedFusion

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

EXECUTIONS = ["routed", "masked", "dense"]


def sized(size):
    return modalities(next(splits(1, size)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_one_export_runs_every_batch(execution, strict):
    fusion = unlike(execution=execution).eval()
    size = Dim("size", min=2, max=64)
    shapes = (({key: {0: size} for key in sized(2)},),)
    with torch.no_grad():
        program = torch.export.export(fusion, (sized(N),), dynamic_shapes=shapes, strict=strict)
        run = program.module()
        for rows in range(2, 34, 2):
            x = sized(rows)
            torch.testing.assert_close(run(x), fusion(x))


@pytest.mark.parametrize("execution", ["masked", "dense"])
def test_masked_exports_need_no_kernels(execution):
    fusion = simple(execution=execution).eval()
    program = torch.export.export(fusion, (next(batches(1)),))
    assert not any("dynmm_kernels" in str(node.target) for node in program.graph.nodes)


def test_onnx():
    pytest.importorskip("onnx", reason="the package onnx is missing")
    pytest.importorskip("onnxscript", reason="the package onnxscript is missing")
    runtime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is missing")
    fusion = simple(execution="masked").float().eval()
    x = next(batches(1)).float()
    shapes = (({0: Dim("size", min=2, max=64)},),)
    program = torch.onnx.export(fusion, (x,), dynamic_shapes=shapes, dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (name,) = [given.name for given in session.get_inputs()]
    for rows in (2, 9, 33):
        x = torch.randn(rows, FEATURES)
        (output,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), fusion(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("execution", ["auto", "masked", "dense"])
@pytest.mark.parametrize(("mode", "device"), [(FakeTensorMode, "cpu"), (nullcontext, "meta")])
def test_without_data(mode, device, execution):
    with mode():
        gate, *branches = [torch.nn.Linear(FEATURES, 3, device=device) for _ in range(4)]
        fusion = RoutedFusion(gate, branches, execution=execution)
        x = torch.randn(5, FEATURES, device=device)
        assert fusion(x).shape == (5, 3)
        with torch.no_grad():
            assert fusion.eval()(x).shape == (5, 3)


def test_masked_traces():
    fusion = simple(execution="masked").eval().requires_grad_(False)
    traced = torch.jit.trace(fusion, next(batches(1)))
    for x in batches():
        assert torch.equal(traced(x), fusion(x))


@pytest.mark.parametrize("execution", ["auto", "routed"])
def test_jit_trace_of_routed_is_refused(execution):
    fusion, x = simple(execution=execution), next(batches(1))
    match = r"RoutedFusion: torch\.jit\.trace.*set execution='masked', or use torch\.export"
    with pytest.raises(ValueError, match=match):
        torch.jit.trace(fusion, x)
    with pytest.raises(ValueError, match=match):
        torch.jit.trace(torch.nn.Sequential(fusion), x)


def test_jit_trace_of_others_is_refused():
    cascade = CascadeFusion([mlp(), mlp()], threshold=0.5).eval()
    with pytest.raises(ValueError, match=r"CascadeFusion: torch\.jit\.trace"):
        torch.jit.trace(cascade, next(batches(1)))

    class Partly(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fusion = EnergyFusion([mlp(), mlp()])

        def forward(self, x):
            return self.fusion(x, x, present=torch.ones(len(x), 2, dtype=torch.bool))

    with pytest.raises(ValueError, match=r"EnergyFusion: torch\.jit\.trace"):
        torch.jit.trace(Partly(), next(batches(1)))


def test_choices_are_exported():
    """A forced decision is an input like any other."""

    class Forced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fusion: RoutedFusion = simple(execution="routed")

        def forward(self, x, choice):
            return self.fusion(x, choice=choice)

    module = Forced().eval()
    example = next(batches(1)), torch.randint(BRANCHES, (N,))
    run = torch.export.export(module, example).module()
    for x in batches():
        choice = torch.randint(-1, BRANCHES, (N,))
        torch.testing.assert_close(run(x, choice), module(x, choice))
