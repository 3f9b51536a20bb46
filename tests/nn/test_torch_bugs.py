"""Bugs of torch that docs/compile.md names: once one of these tests fails, its line there can go.

Plain torch, without this library, on a number of rows that the graph is not told.
"""

import pytest
import torch
from compiling import ATTENTION, check, modalities, splits, unlike
from torch import nn
from torch.export import Dim
from torch.nn.attention import sdpa_kernel

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
]

ROWS, CHANNELS_LAST = 8, torch.channels_last
SWITCH = {"layout_optimization": False}


class First(nn.Module):
    """A network on the first n rows."""

    def __init__(self, network, least=2):
        super().__init__()
        self.network, self.least = network, least

    def forward(self, x, n):
        rows = n.item()
        torch._check(rows >= self.least)
        torch._check(rows <= x.shape[0])
        return self.network(x.narrow(0, 0, rows).clone())


def convolution():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten()
    return First(nn.Sequential(*layers)).eval().requires_grad_(False)


def images():
    return torch.randn(ROWS, 2, 4, 4)


def error(ours, expected):
    return (ours - expected).abs().max() / expected.abs().max()


@pytest.mark.parametrize("of", ["images", "weights"])
def test_convolutions_are_taken_to_be_contiguous(of):
    model, x = convolution(), images()
    if of == "images":
        x = x.contiguous(memory_format=CHANNELS_LAST)
    else:
        model.to(memory_format=CHANNELS_LAST)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        compiled(x, torch.tensor(3))


@pytest.mark.usefixtures("cpp_compiler")
def test_inductor_sees_that_they_are_not():
    compiled, x = torch.compile(convolution(), fullgraph=True), images()
    with pytest.raises(AssertionError, match="expected size"):
        compiled(x, torch.tensor(3))


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.parametrize("switched", [False, True])
def test_packages_do_not_see_it(switched, tmp_path):
    model, x = convolution(), images()
    shapes = {0: Dim("rows", min=2, max=64)}, None
    program = torch.export.export(model, (x, torch.tensor(3)), dynamic_shapes=shapes)
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "model.pt2"),
        inductor_configs=SWITCH if switched else {},
    )
    n = torch.tensor(5)
    wrong = error(torch._inductor.aoti_load_package(path)(x, n), model(x, n))
    assert wrong < 1e-5 if switched else wrong > 0.1


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("of", ["images", "weights"])
def test_the_switch_serves_channels_last(of, training):
    if training and torch.__version__ < "2.11":
        pytest.skip("torch 2.10 stops in the backward pass of the convolution, switch or not")
    fusion = unlike(execution="routed").train(training)
    if of == "weights":
        fusion.branches[2].to(memory_format=CHANNELS_LAST)

    def made(steer):
        x = modalities(steer)
        if of == "images":
            x["image"] = x["image"].contiguous(memory_format=CHANNELS_LAST)
        return x

    with torch._inductor.config.patch(SWITCH), sdpa_kernel(ATTENTION):
        check(fusion, map(made, splits(6)), 1e-7, backend="inductor")


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.own(x, x, x, need_weights=False)[0].transpose(0, 1)


@pytest.mark.skipif(torch.__version__ < "2.11", reason="not always in torch 2.10")
@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.parametrize("least", [1, 2])
def test_attention_takes_one_row_at_least_for_one(least):
    """Why starved branches run on two rows."""
    model = First(Attending(), least).eval().requires_grad_(False)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(ROWS, 5, 4)
    for rows in (3, 5):
        n = torch.tensor(rows)
        if least == 2:
            torch.testing.assert_close(compiled(x, n), model(x, n))
            continue
        try:
            wrong = compiled(x, n).shape != model(x, n).shape
        except (AssertionError, RuntimeError):
            wrong = True
        assert wrong


@pytest.mark.skipif(torch.__version__ >= "2.11", reason="of torch 2.10")
def test_the_fast_path_of_transformers_has_no_shapes():
    model = First(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)).eval()
    x, n = torch.randn(ROWS, 5, 4), torch.tensor(3)
    torch.backends.mha.set_fastpath_enabled(True)  # which `fresh_dynamo` puts back
    with pytest.raises(Exception, match="transformer_encoder_layer"), torch.no_grad():
        torch.compile(model, backend="aot_eager", fullgraph=True)(x, n)
    torch._dynamo.reset()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        actual = torch.compile(model, backend="aot_eager", fullgraph=True)(x, n)
        torch.testing.assert_close(actual, model(x, n))
