"""starved="run" of stacks: all stages, fusions and gates are called in every call, as often."""

import copy

import pytest
import torch
from compiling import GATE_GRADS, assert_agree
from models import backward
from stacks import CHANNELS, Pool, batch, parts
from torch import nn

from dynmm_kernels import ChainedFusion, NestedFusion

DEPTH = 3


class Steered(nn.Module):
    """A gate that decides as it is told, and learns."""

    def __init__(self, columns):
        super().__init__()
        self.own, self.columns, self.told = Pool(2 * CHANNELS, columns), columns, None

    def forward(self, main, aux):
        real = self.own(main, aux)
        if self.told is None:
            return real
        return real - real.detach() + nn.functional.one_hot(self.told, self.columns)[: len(real)]


def nested(kind="mlp", **settings):
    torch.manual_seed(0)
    return NestedFusion(Steered(DEPTH + 1), *parts(kind, DEPTH), **settings)


def chained(kind="mlp", **settings):
    torch.manual_seed(0)
    rules = settings.get("rules", ["dynamic"] * DEPTH)
    gates = [Steered(2) if rule == "dynamic" else None for rule in rules]
    return ChainedFusion(gates, *parts(kind, DEPTH), **settings)


def bare(fusion):
    """Its stages, fusions and gates."""
    gates = [fusion.gate] if isinstance(fusion, NestedFusion) else fusion.gates.values()
    stages = [*fusion.main_stages, *fusion.aux_stages, *fusion.fusions]
    return [branch.module for branch in (*gates, *stages)]


def watched(fusion):
    """The parts called since it was emptied, and with how many rows."""
    calls = []
    for i, part in enumerate(bare(fusion)):
        part.register_forward_hook(lambda *seen, i=i: calls.append((i, len(seen[2]))))
    return calls


def tell(fusion, step, size):
    """All samples alike, or each as its gates find; every third time."""
    gates = [part for part in fusion.modules() if isinstance(part, Steered)]
    for i, gate in enumerate(gates):
        alike = [None, 0, gate.columns - 1, (step + i) % gate.columns][step % 4]
        gate.told = None if alike is None else torch.full((size,), alike)


def check(fusion, kind="mlp", size=7, steps=8):
    """As masked in values and gradients, and one order of calls in training and one in eval."""
    masked = copy.deepcopy(fusion)
    masked.execution = "masked"
    calls, used = watched(fusion), watched(masked)
    orders = [set(), set()]
    for step in range(steps):
        x = batch(kind, size)
        for f in (fusion, masked):
            tell(f, step, size)
        calls.clear()
        results = [backward(f, [f], x) for f in (fusion, masked)]
        assert_agree(*results)
        missing = [[grad is None for grad in result.all()] for result in results]
        assert missing[0] == missing[1]
        orders[0].add(tuple(i for i, _ in calls))
        assert min(rows for _, rows in calls) >= min(size, 2)
        with torch.no_grad():
            calls.clear()
            torch.testing.assert_close(fusion(*x), masked(*x))
            orders[1].add(tuple(i for i, _ in calls))
    assert [len(each) for each in orders] == [1, 1]
    for order in orders:
        assert {*order.pop()} == {i for i, _ in used}


@pytest.mark.parametrize("gate_grad", GATE_GRADS)
@pytest.mark.parametrize("make", [nested, chained])
def test_every_part_is_called_as_often(make, gate_grad):
    check(make(gate_grad=gate_grad, starved="run"))


@pytest.mark.parametrize("kind", ["nchw", "channels_last"])
@pytest.mark.parametrize("make", [nested, chained])
def test_maps(make, kind):
    check(make(kind, starved="run"), kind)


@pytest.mark.parametrize("size", [0, 1, 2, 3])
@pytest.mark.parametrize("make", [nested, chained])
def test_few_samples(make, size):
    """Fewer than two: all there are, so none of a batch without samples."""
    check(make(starved="run"), size=size)


@pytest.mark.parametrize(
    "settings",
    [
        {"gates_read": "stages"},
        {"rules": ["fuse", "dynamic", "dynamic"]},
        {"rules": ["dynamic", "skip", "dynamic"]},
        {"rules": ["dynamic", "fuse", "fuse"], "gate_grad": "selected"},
        {"rules": ["dynamic", "fuse_all", "dynamic"]},
        {"independent": True},
    ],
    ids=str,
)
def test_chains_of_every_kind(settings):
    check(chained(starved="run", **settings))


@pytest.mark.parametrize("make", [nested, chained])
def test_forced_depths_and_stages(make):
    fusion = make(starved="run")
    masked, calls = copy.deepcopy(fusion), watched(fusion)
    masked.execution = "masked"
    x, orders = batch("mlp", 6), set()
    for depth in (0, DEPTH, torch.tensor([0, 1, 2, 3, 0, 1]), "random"):
        calls.clear()
        options = {"depth": depth, "stages": [1, 3]}
        results = [
            f(*x, **options, generator=torch.Generator().manual_seed(1)) for f in (fusion, masked)
        ]
        torch.testing.assert_close(*results)
        orders.add(tuple(i for i, _ in calls))
    assert len(orders) == 1


@pytest.mark.parametrize("make", [nested, chained])
def test_reports_as_without(make):
    fusion, x = make(starved="run"), batch("mlp", 9)
    skipping = copy.deepcopy(fusion)
    skipping.starved, skipping.execution = "skip", "routed"
    (_, actual), (_, expected) = (f(*x, return_routing=True) for f in (fusion, skipping))
    assert torch.equal(actual.choice, expected.choice)
    assert actual.counts == expected.counts
    torch.testing.assert_close(actual.weights, expected.weights)


@pytest.mark.parametrize("make", [nested, chained])
def test_an_undefined_logit_is_named(make):
    fusion, (main, aux) = make(starved="run"), batch("mlp", 5)
    main[3] = float("nan")
    with pytest.raises(ValueError, match=r"gate.*row 3|sample 3|row 3"):
        fusion(main, aux)


@pytest.mark.parametrize("make", [nested, chained])
def test_second_derivatives(make):
    """Refused through what ran without a graph, else as masked."""
    x = [tensor.requires_grad_() for tensor in batch("mlp", 4)]

    def twice(**settings):
        output = make(**settings)(*x)
        (grad, _) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)

    actual = twice(starved="run", gate_grad="selected")
    torch.testing.assert_close(actual, twice(execution="masked", gate_grad="selected"))
    with pytest.raises(RuntimeError, match="a second derivative"):
        twice(starved="run")
