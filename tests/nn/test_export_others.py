"""torch.export of stacks and cascades, and what exporters to ONNX are told."""

import pytest
import torch
from compiling import batches, simple
from models import FEATURES, mlp
from stacks import CHANNELS, Pool, batch, parts
from torch.export import Dim

from dynmm_kernels import ChainedFusion, EnergyFusion, NestedFusion, RoutedFusion

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
]

KINDS = {
    "nested": {},
    "chained": {},
    "chained by stages": {"gates_read": "stages"},
    "chained and static": {"rules": ["dynamic", "skip", "fuse"]},
}
SIZE = Dim("size", min=2, max=64)
STRICT = pytest.mark.parametrize("strict", [False, True])


def stack(kind, **settings):
    torch.manual_seed(0)
    settings = {"execution": "routed", **KINDS[kind], **settings}
    if kind == "nested":
        return NestedFusion(Pool(2 * CHANNELS, 4), *parts("mlp", 3), **settings).eval()
    rules = settings.get("rules", ["dynamic"] * 3)
    gates = [Pool(2 * CHANNELS, 2) if rule == "dynamic" else None for rule in rules]
    return ChainedFusion(gates, *parts("mlp", 3), **settings).eval()


def streams(rows):
    """Of mixed decisions, and of samples that are alike."""
    main, aux = batch("mlp", rows)
    yield 3 * main, 3 * aux
    yield from ((scale * main[:1].expand_as(main), aux) for scale in (-5, 5))


class Forced(torch.nn.Module):
    """Depths are inputs, and all stages are wanted."""

    def __init__(self, fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, main, aux, depth):
        return self.fusion(main, aux, depth=depth, stages=[1, 3])


def exported(module, example, strict):
    shapes = tuple({0: SIZE} for _ in example)
    if isinstance(module, RoutedFusion):
        shapes = (shapes,)
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=strict)


@STRICT
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_exported_for_every_decision(kind, strict):
    fusion = stack(kind)
    program = exported(fusion, batch("mlp", 9), strict)
    assert any("dynmm_kernels" in str(node.target) for node in program.graph.nodes)
    run, depths = program.module(), set()
    for rows in (2, 3, 5, 8, 17, 33):
        for x in streams(rows):
            output, routing = fusion(*x, return_routing=True)
            torch.testing.assert_close(run(*x), output)
            depths.update(routing.choice.tolist())
    assert len(depths) > 1


@STRICT
@pytest.mark.parametrize("kind", ["nested", "chained"])
def test_depths_are_exported(kind, strict):
    module = Forced(stack(kind))
    example = *batch("mlp", 9), torch.randint(4, (9,))
    run = exported(module, example, strict).module()
    for rows in (2, 5, 17):
        for depth in (torch.randint(4, (rows,)), torch.zeros(rows).long(), torch.full((rows,), 3)):
            x = *batch("mlp", rows), depth
            torch.testing.assert_close(run(*x), module(*x))


@STRICT
@pytest.mark.parametrize("kind", ["routed", "nested", "chained"])
def test_onnx_has_no_operators_for_routed(kind, strict, monkeypatch):
    """Refused in words; what "auto" becomes holds torch's own operators alone."""
    x = (next(batches(1)),) if kind == "routed" else batch("mlp", 9)
    fusion = simple(execution="routed").eval() if kind == "routed" else stack(kind)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(Exception, match=r"routed execution has no operators in ONNX; set execu"):
        exported(fusion, x, strict)
    fusion.execution = "auto"
    program = exported(fusion, x, strict)
    assert not any("dynmm_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*x), fusion(*x))


class Reporting(torch.nn.Module):
    """A choice by name, and the routing's own numbers."""

    def __init__(self):
        super().__init__()
        self.fusion = simple(execution="routed")

    def forward(self, x):
        output, routing = self.fusion(x, return_routing=True)
        return output, routing.weights, self.fusion(x, choice="uniform")


@STRICT
def test_what_was_decided_is_exported(strict):
    module = Reporting().eval()
    run = exported(module, (next(batches(1)),), strict).module()
    for rows in (2, 5, 17):
        x = torch.randn(rows, FEATURES, dtype=torch.float64)
        torch.testing.assert_close(run(x), module(x))


class Partly(torch.nn.Module):
    """Energy fusion of the modalities there are."""

    def __init__(self):
        super().__init__()
        self.fusion = EnergyFusion([mlp(), mlp()])

    def forward(self, x, y, present):
        output = self.fusion(x, y, present=present, return_details=True)
        return output.fused, *output.logits


@STRICT
@pytest.mark.parametrize("onnx", [False, True])
def test_energy_fusion_is_exported(onnx, strict, monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: onnx)
    fusion = Partly().eval()

    def some(rows):
        x, y = torch.randn(2, rows, FEATURES, dtype=torch.float64)
        return x, y, torch.rand(rows, 2) > 0.4

    program = exported(fusion, some(9), strict)
    assert onnx != any("dynmm_kernels" in str(node.target) for node in program.graph.nodes)
    run = program.module()
    for rows in (2, 5, 17):
        x, y, present = some(rows)
        for there in (present, torch.ones_like(present), torch.zeros_like(present)):
            torch.testing.assert_close(run(x, y, there), fusion(x, y, there))


def test_energy_fusion_without_data():
    fusion = Partly().to("meta")
    x = torch.empty(5, FEATURES, device="meta", dtype=torch.float64)
    fused, *_ = fusion(x, x, torch.empty(5, 2, device="meta", dtype=torch.bool))
    assert fused.shape == (5, 3)


@pytest.mark.parametrize("kind", ["routed", "nested", "chained"])
def test_tensors_without_data_do_not_route(kind):
    fusion = simple(execution="routed") if kind == "routed" else stack(kind)
    x = (next(batches(1)),) if kind == "routed" else batch("mlp", 9)
    with pytest.raises(ValueError, match=r"tensors without data cannot tell; set execution='mask"):
        fusion.to("meta")(*(tensor.to("meta") for tensor in x))
