"""starved="run": every branch is called in every call, as often, and nothing changes for it."""

import copy

import pytest
import torch
from compiling import GATE_GRADS, assert_agree, batches, simple
from models import FEATURES, FixedGate, Function, backward
from torch import nn

from dynmm_kernels import RoutedFusion


def watched(fusion):
    """The branches called since it was emptied, and with how many rows."""
    calls = []
    for b, branch in enumerate(fusion.branches):
        branch.module.register_forward_hook(lambda *seen, b=b: calls.append((b, len(seen[2]))))
    return calls


@pytest.mark.parametrize("select", [1, 2, "multi_hot"])
@pytest.mark.parametrize("gate_grad", GATE_GRADS)
def test_every_branch_is_called_as_often(gate_grad, select):
    fusion = simple(gate_grad=gate_grad, select=select, starved="run")
    masked = copy.deepcopy(fusion)
    masked.execution = "masked"
    calls, orders = watched(fusion), set()
    for step, x in enumerate(batches(9)):
        if step % 3 == 0:  # all samples alike, so branches starve
            x = x[:1].expand_as(x).clone()
        calls.clear()
        assert_agree(*(backward(f, [f], (x,)) for f in (fusion, masked)))
        orders.add(tuple(b for b, _ in calls))
        assert min(rows for _, rows in calls) >= 2
        with torch.no_grad():
            calls.clear()
            torch.testing.assert_close(fusion(x), masked(x))
            assert [b for b, _ in calls] == [0, 1, 2]
    (order,) = orders
    exact = gate_grad == "straight_through" and select != 2
    assert order == (0, 1, 2) * (2 if exact else 1)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_few_samples(size):
    fusion = simple(starved="run")
    x = torch.randn(size, FEATURES, dtype=torch.float64)
    expected = RoutedFusion(fusion.gate, fusion.branches)(x)
    torch.testing.assert_close(fusion(x), expected)


def test_second_derivatives_are_exact():
    fusion = simple(starved="run", select=2, gate_grad="selected")
    x = torch.randn(4, FEATURES, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fusion, (x,))
    assert torch.autograd.gradgradcheck(fusion, (x,))


def test_another_value_is_refused():
    with pytest.raises(ValueError, match="starved must be one of 'skip', 'run'; got 'walk'"):
        simple(starved="walk")


def test_an_infinite_slope_at_a_copied_sample_poisons_as_when_masked():
    """Zero times infinity; eager routed execution does not call the branch."""

    def slope(**settings):
        root = nn.Sequential(nn.Linear(1, 1, bias=False), Function(torch.sqrt))
        nn.init.ones_(root[0].weight)
        other = nn.Linear(1, 1)
        fusion = RoutedFusion(
            FixedGate(torch.tensor([[0.0, 1.0]] * 4), False), [root, other], **settings
        )
        fusion(torch.zeros(4, 1)).sum().backward()
        return root[0].weight.grad

    assert slope(execution="masked").isnan().all()
    assert slope(execution="routed", starved="run").isnan().all()
    assert not slope(execution="routed").any()
