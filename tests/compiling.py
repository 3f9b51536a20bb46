"""Modules compiled as one graph against masked execution, and decisions of all kinds."""

import copy

import torch
from models import FEATURES, backward, mlp
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import one_hot
from torch.utils._pytree import tree_leaves

from dynmm_kernels import Branch, RoutedFusion

N, BRANCHES = 9, 3
GATE_GRADS = ["none", "selected", "straight_through"]


# In torch 2.10 Inductor takes a part of fused attention in fp64 for fp32.
ATTENTION = [SDPBackend.MATH, *[SDPBackend.FLASH_ATTENTION] * (torch.__version__ >= "2.11")]


class Counted:
    """A module compiled as one graph, and how often that was done."""

    def __init__(self, module, backend="aot_eager", **options):
        self.graphs = 0
        compiler = torch._dynamo.lookup_backend(backend)

        def compile_once(graph, example):
            self.graphs += 1
            return compiler(graph, example)

        self.call = torch.compile(module, backend=compile_once, fullgraph=True, **options)

    def __call__(self, *inputs, **named):
        return self.call(*inputs, **named)


class Steered(nn.Module):
    """A gate that chooses what its input says, and learns."""

    def __init__(self):
        super().__init__()
        self.own = mlp(BRANCHES)

    def forward(self, x, steer):
        real = self.own(x)
        return real - real.detach() + steer


def splits(count, size=N):
    """Decisions as logits [N, B]: mixed, with starved branches, all for one."""
    for step in range(count):
        first, last = (step % 3, step % 3) if step % 4 == 0 else (step % 2, 2 - step % 3 // 2)
        choice = torch.randint(min(first, last), max(first, last) + 1, (size,))
        yield 2 * one_hot(choice, BRANCHES).double() - 1 + 0.1 * torch.rand(size, BRANCHES)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, sequence):
        return self.head(self.encoder(sequence).mean(1))


def three_branches():
    """Unlike networks: of x [n, F], of a sequence [n, 5, 4], of an image [n, 2, 4, 4]."""
    image = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)
    )
    return {
        "x": Branch(mlp(), inputs="x"),
        "sequence": Branch(Attending().double(), inputs="sequence"),
        "image": Branch(image.double(), inputs="image"),
    }


def modalities(steer):
    size = len(steer)
    return {
        "x": torch.randn(size, FEATURES, dtype=torch.float64),
        "sequence": torch.randn(size, 5, 4, dtype=torch.float64),
        "image": torch.randn(size, 2, 4, 4, dtype=torch.float64),
        "steer": steer,
    }


def unlike(**settings):
    torch.manual_seed(3)
    return RoutedFusion(Branch(Steered(), inputs=["x", "steer"]), three_branches(), **settings)


def assert_agree(actual, expected, tolerance=1e-9):
    """Outputs and gradients; None where masked execution multiplies by zero."""
    outputs = zip(tree_leaves(actual.output), tree_leaves(expected.output), strict=True)
    for a, e in (*outputs, *zip(actual.all(), expected.all(), strict=True)):
        if a is None or e is None:
            assert a is e or not (a if e is None else e).any()
        else:
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def check(fusion, batches, tolerance=1e-9, call=lambda fuse, x: fuse(x), **compiling):
    """Each batch compiled as in masked execution, with gradients where it trains; one graph."""
    masked = copy.deepcopy(fusion)
    masked.execution = "masked"
    compiled = Counted(fusion, **compiling)
    for x in batches:
        if fusion.training:
            results = [
                backward(lambda *own, f=f: call(f, *own), [modules], (x,))
                for f, modules in ((compiled, fusion), (masked, masked))
            ]
            assert_agree(*results, tolerance)
        else:
            with torch.no_grad():
                results = tree_leaves(call(compiled, x)), tree_leaves(call(masked, x))
            for a, e in zip(*results, strict=True):
                torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
    assert compiled.graphs == 1


def simple(**settings):
    torch.manual_seed(0)
    return RoutedFusion(mlp(BRANCHES), [mlp() for _ in range(BRANCHES)], **settings)


def batches(count=6):
    return (torch.randn(N, FEATURES, dtype=torch.float64) for _ in range(count))
