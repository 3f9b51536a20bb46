"""Which branches of a RoutedFusion run, on which rows, and what they may be and return."""

import itertools
from collections import Counter

import pytest
import torch
from models import (
    CHOICES,
    FEATURES,
    GATE_GRADS,
    MODES,
    Calls,
    Function,
    Planned,
    assert_close,
    assert_masked,
    assert_same,
    backward,
    choosing,
    hard_weights,
    masked_fusion,
    mlp,
    samples,
    toy,
)
from torch import Tensor, nn

from dynmm_kernels import Branch, RoutedFusion, resource_loss


@pytest.mark.parametrize("gate_grad", GATE_GRADS)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_no_branch_is_called_without_rows(choice, gate_grad):
    gate, branches = choosing(choice, 3), toy()[1]
    calls = Calls.of(branches)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
    routing = fusion(samples(len(choice)), return_routing=True)[1]
    assert 0 not in itertools.chain(*calls.rows)
    assert tuple(calls.total()) == routing.rows_run
    counts = Counter(choice)
    assert routing.counts == tuple(counts[b] for b in range(3))
    full = gate_grad == "straight_through"
    assert routing.rows_run == ((len(choice),) * 3 if full else routing.counts)


@pytest.mark.parametrize("n", [1, 4])
def test_all_to_one_copies_nothing(n, call):
    branches = toy()[1]
    calls = Calls.of(branches)
    fusion = RoutedFusion(choosing([1] * n, 3), branches, execution="routed", gate_grad="none")
    x = samples(n)
    call(fusion, x)
    (seen,) = calls.arguments[1][0]
    assert seen.data_ptr() == x.data_ptr()
    assert calls.rows == [[], [n], []]


def test_gate_is_called_once_with_everything(call):
    gate, branches = toy()
    calls = Calls.of([gate])
    call(RoutedFusion(gate, branches, execution="routed"), samples(5))
    assert calls.rows == [[5]]


@pytest.mark.parametrize("execution", MODES)
def test_one_branch(execution):
    gate, branches = toy(num_branches=1)
    x = (samples(5),)
    fusion = RoutedFusion(gate, branches, execution=execution)
    assert_masked(fusion, masked_fusion(gate, branches), [gate, *branches], x)


@pytest.mark.parametrize("n", [1, 5, 64])
def test_many_branches(n):
    gate, branches = toy(num_branches=16)
    x = (samples(n),)
    fusion = RoutedFusion(gate, branches, execution="routed")
    assert_masked(fusion, masked_fusion(gate, branches), [gate, *branches], x)


@pytest.mark.parametrize("choice", [[0, 1, 2, 1], [2, 2, 2, 2], [1, 1, 1, 1]])
def test_one_module_as_several_branches(choice):
    shared, other = mlp(), mlp()
    gate, branches = choosing(choice, 3), [shared, other, shared]
    x = (samples(4),)
    fusion = RoutedFusion(gate, branches, execution="routed")
    assert_masked(fusion, masked_fusion(gate, branches), [gate, *branches], x)


class Detached(nn.Module):
    """An expert that never learns; the gate still learns from it."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        with torch.no_grad():
            return self.body(x)


class Constant(nn.Module):
    """One learnt row, expanded: an output, or logits, with stride 0."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.row = nn.Parameter(torch.randn(outputs, dtype=torch.float64))

    def forward(self, x):
        return self.row.expand(len(x), -1)


class PartlyUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = mlp(), mlp()

    def forward(self, x):
        return self.used(x)


def tied():
    body = nn.Linear(FEATURES, FEATURES).double()
    return nn.Sequential(body, mlp(3)), [nn.Sequential(body, mlp()) for _ in range(3)]


AWKWARD_MODELS = {
    "one detached branch": lambda: (mlp(3), [Detached(), mlp(), mlp()]),
    "all detached": lambda: (mlp(3), [Detached(), Detached(), Detached()]),
    "constant outputs": lambda: (mlp(3), [Constant(), mlp(), Constant()]),
    "one decision for all": lambda: (Constant(), [mlp(), mlp(), mlp()]),
    "unused parameters": lambda: (mlp(3), [PartlyUsed(), PartlyUsed(), PartlyUsed()]),
    "gate and branches share a layer": tied,
}


@pytest.mark.parametrize("make", AWKWARD_MODELS.values(), ids=AWKWARD_MODELS)
@pytest.mark.parametrize("execution", MODES)
def test_awkward_models(execution, make):
    gate, branches = make()
    if not isinstance(gate, Constant):  # it decides for all alike; of the others no branch starves
        gate = Planned(gate, torch.arange(9) % 3, 3)
    x = (samples(9),)
    fusion = RoutedFusion(gate, branches, execution=execution)
    assert_masked(fusion, masked_fusion(gate, branches), [gate, *branches], x)


@pytest.mark.parametrize(("make", "idle"), [(Detached, "body"), (PartlyUsed, "unused")])
def test_parameters_without_a_graph(make, idle):
    """None while their branch runs, as in masked; zeros, like all of its parameters, while not."""
    branch = make()
    modules = [getattr(branch, idle)]
    for choice in ([0, 1, 0], [1, 1, 1]):
        gate, branches, x = choosing(choice, 2), [branch, mlp()], (samples(3),)
        masked = backward(masked_fusion(gate, branches), modules, x).parameters
        routed = backward(RoutedFusion(gate, branches, execution="routed"), modules, x).parameters
        assert all(g is None for g in masked)
        starved = 0 not in choice
        assert all((g is not None) == starved for g in routed)
        assert not any(g.any() for g in routed if starved)


def test_two_calls_in_one_graph():
    gate, branches = toy()
    modules, x = [gate, *branches], (samples(9),)
    fusion, masked = RoutedFusion(gate, branches, execution="routed"), masked_fusion(gate, branches)
    expected = backward(lambda x: masked(x) + masked(2 * x).sin(), modules, x)
    assert_same(backward(lambda x: fusion(x) + fusion(2 * x).sin(), modules, x), expected)


def test_task_and_resource_loss_together():
    gate, branches = toy()
    modules, x = [gate, *branches], (samples(9),)
    fusion, masked = RoutedFusion(gate, branches, execution="routed"), masked_fusion(gate, branches)
    costs = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)

    def routed_loss(x):
        output, routing = fusion(x, return_routing=True)
        return output.square().sum() + resource_loss(routing, costs.tolist())

    def masked_loss(x):
        return masked(x).square().sum() + (hard_weights(gate(x)) @ costs).mean()

    assert_same(backward(routed_loss, modules, x), backward(masked_loss, modules, x))


def test_branches_can_be_used_again(call):
    """In another fusion, elsewhere in the list, twice: a Branch is not marked by its first use."""
    gate, (first, second) = toy(2)
    x = samples(5)
    expected = masked_fusion(gate, [second, first])(x)
    one, two = Branch(first), Branch(second)
    RoutedFusion(gate, [one, two])
    assert_close(call(RoutedFusion(gate, [two, first], execution="routed"), x), expected)
    assert_close(call(RoutedFusion(gate, [two, two], execution="routed"), x), second(x))


def test_branches_by_name(call):
    gate, (first, second) = toy(num_branches=2)
    fusion = RoutedFusion(gate, {"text": first, "fused": Branch(second)}, execution="routed")
    x = samples(5)
    assert_close(call(fusion, x), masked_fusion(gate, [first, second])(x))


class TwoHeads(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.body, self.kind = mlp(4), kind

    def forward(self, x: Tensor):
        scores = self.body(x)
        label = scores.argmax(1) + 2**60 + 1  # not an integer that a float can hold
        tall = scores[:, :, None, None] * x[:, None, :2, None]
        if self.kind == "tuple":
            return scores, (label, tall)
        return {"scores": scores, "more": {"label": label, "sure": scores[:, 0] > 0, "tall": tall}}


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("execution", MODES)
def test_nested_outputs(execution, choice, kind):
    gate, branches = choosing(choice, 3), [TwoHeads(kind) for _ in range(3)]
    x = (samples(len(choice)),)
    fusion = RoutedFusion(gate, branches, execution=execution)
    assert_masked(fusion, masked_fusion(gate, branches), [gate, *branches], x)
    assert type(fusion(*x)) is type(branches[0](*x))


@pytest.mark.parametrize("execution", MODES)
def test_integer_outputs_alone(execution, call):
    branches = [Function(lambda x, b=b: x[:, 0].long() + b * 2**61 + 1) for b in range(2)]
    x = torch.arange(4.0)[:, None]
    output = call(RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution=execution), x)
    assert output.dtype is torch.int64
    assert output.tolist() == [1, 2**61 + 2, 2**61 + 3, 4]
