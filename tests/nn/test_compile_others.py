"""Stacks, cascades and energy fusion compiled as a whole: one graph for every decision."""

import pytest
import torch
from compiling import (
    GATE_GRADS,
    Counted,
    N,
    assert_agree,
    batches,
    check,
)
from models import backward, mlp
from torch import nn

from dynmm_kernels import (
    CascadeFusion,
    ChainedFusion,
    EnergyFusion,
    NestedFusion,
)
from dynmm_kernels.nn import Add, SEAdd

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Deepening(nn.Module):
    """A gate for depths: its own logits, and what the first pixel asks for."""

    def __init__(self):
        super().__init__()
        self.own = nn.Linear(2 * 36, 3).double()

    def forward(self, main, aux):
        real = self.own(torch.cat([main.flatten(1), aux.flatten(1)], 1))
        wanted = main[:, 0, 0, 0].detach().round().clamp(0, 2)
        return real + 50 * (torch.arange(3) == wanted.unsqueeze(1))


def stack(join, **settings):
    def stages():
        layers = [nn.Conv2d(4, 4, 3, padding=1).double() for _ in range(2)]
        return [layers[0], nn.Sequential(layers[1], nn.ReLU(inplace=True))]

    joins = [join().double() for _ in range(2)]
    return NestedFusion(Deepening(), stages(), stages(), joins, **settings)


def depths(count):
    """Batches that ask for mixed depths, some not at all."""
    for step in range(count):
        main, aux = (torch.randn(N, 4, 3, 3, dtype=torch.float64) for _ in range(2))
        main[:, 0, 0, 0] = torch.randint(3, (N,)) if step % 2 else step // 2 % 3
        yield main, aux


@pytest.mark.parametrize("join", [Add, lambda: SEAdd(4, 2)], ids=["Add", "SEAdd"])
@pytest.mark.parametrize("gate_grad", GATE_GRADS)
def test_nested(gate_grad, join):
    fusion = stack(join, gate_grad=gate_grad)
    check(fusion, depths(8), call=lambda fuse, x: fuse(*x))


def test_nested_eval_and_stages():
    fusion = stack(Add).eval()
    check(fusion, depths(20), call=lambda fuse, x: fuse(*x, stages=[1, 2]), backend="eager")


def test_forced_depths():
    fusion = stack(Add)
    compiled = Counted(fusion, "eager")
    for step, (main, aux) in enumerate(depths(8)):
        depth = torch.randint(3, (N,)) if step % 2 else torch.full((N,), step // 2 % 3)
        expected = fusion(main, aux, depth=depth)
        torch.testing.assert_close(compiled(main, aux, depth=depth), expected)
    assert compiled.graphs == 1


class Deciding(nn.Module):
    """A gate of a cell: its own logits, and what the first feature asks for."""

    def __init__(self):
        super().__init__()
        self.own = nn.Linear(6, 2).double()

    def forward(self, main, aux):
        wanted = main[:, :1].detach() * main.new_tensor([[-50.0, 50.0]])
        return self.own(main + aux) + wanted


def chain(**settings):
    stages = [[nn.Linear(6, 6).double() for _ in range(2)] for _ in range(2)]
    gates = [Deciding(), None if "rules" in settings else Deciding()]
    return ChainedFusion(gates, *stages, [Add(), Add()], **settings)


def streams(count):
    """Batches of which the first cell drops some, all, none."""
    for step in range(count):
        x = next(batches(1))
        if step % 3:
            x[:, 0] = x[:, 0].abs() * (3 - 2 * (step % 3))
        yield x, x.flip(0)


@pytest.mark.parametrize(
    "settings",
    [{"gate_grad": gate_grad} for gate_grad in GATE_GRADS]
    + [{"gates_read": "stages"}, {"rules": ["dynamic", "fuse"]}],
    ids=str,
)
def test_chained(settings):
    torch.manual_seed(2)
    fusion = chain(execution="routed", **settings)
    check(fusion, streams(7), call=lambda fuse, x: fuse(*x))


def test_chained_eval_and_stages():
    fusion = chain(execution="routed").eval()
    check(fusion, streams(12), call=lambda fuse, x: fuse(*x, stages=[1, 2]), backend="eager")


def cascade(**settings):
    return CascadeFusion([mlp() for _ in range(3)], threshold=0.5, **settings).eval()


@pytest.mark.parametrize("execution", ["auto", "masked"])
def test_chains_and_cascades_run_masked(execution):
    own, other = chain(execution=execution), cascade(execution=execution)
    compiled = Counted(own, "eager"), Counted(other, "eager")
    for x in batches():
        torch.testing.assert_close(compiled[0](x, x), own(x, x))
        torch.testing.assert_close(compiled[1](x), other(x))
    assert [one.graphs for one in compiled] == [1, 1]


def test_energy_of_batches_of_any_size():
    fusion = EnergyFusion([mlp() for _ in range(3)])

    def call(x, present, targets):
        return [*fusion(x, x, -x, present=present, targets=targets)[::2]]

    compiled = Counted(call)
    for size in (9, 5, 7, 30):
        x = torch.randn(size, 6, dtype=torch.float64)
        given = x, torch.rand(size, 3) > 0.5, torch.randint(3, (size,))
        torch.testing.assert_close(compiled(*given), call(*given))
    assert compiled.graphs <= 2


def test_energy():
    fusion = EnergyFusion([mlp() for _ in range(3)])
    compiled = Counted(fusion)
    for step, x in enumerate(batches(9)):
        present = torch.rand(N, 3) > 0.5
        present[:, step % 3] &= step % 2 == 0
        results = [
            backward(lambda *own, f=f: f(*own, present=present), [fusion], (x, 2 * x, -x))  # noqa: B023
            for f in (compiled, fusion)
        ]
        assert_agree(*results)
    assert compiled.graphs == 1
