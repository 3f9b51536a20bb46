"""How often the host waits for a plan: counted where the wait happens, so that no GPU is needed.

What a GPU adds (no hidden synchronisation anywhere else) is in test_gpu.py.
"""

from functools import partial
from weakref import ref

import pytest
import torch
from models import FEATURES, FixedGate, toy
from torch import nn

from dynmm_kernels import NestedFusion, RoutedFusion, combine, gather, ops
from dynmm_kernels.functional import checks, plan
from dynmm_kernels.functional.plan import RoutingPlan


@pytest.fixture
def waits(monkeypatch) -> list[int]:
    """One entry per wait for a plan's counts, which stand in for the copy from a GPU."""
    waited: list[int] = []

    def host_copy(header):
        def wait():
            waited.append(1)
            return header.tolist()

        return wait

    monkeypatch.setattr(plan, "host_copy", host_copy)
    return waited


def unread(choice: torch.Tensor) -> RoutingPlan:
    """The plan that `route` leaves on a GPU, whose header is not on the CPU."""
    made = RoutingPlan(*ops.kernels().route(choice, 2), 2)
    made._check = partial(checks.check_choice, choice)
    return made


@pytest.mark.parametrize("gate_grad", ["straight_through", "selected", "none"])
def test_a_training_step_waits_once(waits, gate_grad):
    fusion = RoutedFusion(*toy(), gate_grad=gate_grad)
    output, routing = fusion(torch.randn(32, FEATURES).double(), return_routing=True)
    output.sum().backward()
    assert routing.counts == routing.plan.counts
    assert sum(routing.counts) == 32
    assert len(waits) == 1


def test_a_plan_in_use_never_waits_again(waits):
    fusion = RoutedFusion(*toy()).eval()
    x = torch.randn(32, FEATURES).double()
    _, routing = fusion(x, return_routing=True)
    assert len(waits) == 1
    for _ in range(3):
        assert torch.equal(combine(routing.plan, gather(routing.plan, x)), x)
    assert len(waits) == 1


def test_a_fault_is_raised_with_the_counts(waits):
    """As `route` leaves it on a GPU: nothing is read before somebody needs the counts."""
    choice = torch.tensor([0, 7, 1, -2])
    made = unread(choice)
    assert not waits
    for _ in range(2):
        with pytest.raises(ValueError, match=r"got 7 in row 1 \(2 such in all\)"):
            _ = made.counts
    assert len(waits) == 1


def test_a_selection_is_let_go_once_it_was_checked(waits):
    choice = torch.tensor([0, 1, 1])
    made, alive = unread(choice), ref(choice)
    del choice
    assert alive() is not None
    assert made.counts == (1, 2)
    assert alive() is None


def unprefetched(plan: RoutingPlan, check=None) -> RoutingPlan:
    """As on a GPU, where nothing is read before it is needed."""
    plan._check = check
    return plan


@pytest.mark.parametrize("execution", ["masked", "routed", "auto"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "routed"])
def test_what_is_read_late_is_checked(monkeypatch, nested, execution):
    monkeypatch.setattr(RoutingPlan, "prefetch", unprefetched)
    gate = FixedGate(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))
    parts = [[nn.Linear(FEATURES, FEATURES)] for _ in range(2)]
    x = torch.randn(2, FEATURES)
    if nested:
        fusion, inputs = NestedFusion(gate, *parts, [Sum()], execution=execution), (x, x)
    else:
        fusion, inputs = RoutedFusion(gate, [*parts[0], *parts[1]], execution=execution), (x,)
    with pytest.raises(ValueError, match=r"got \[nan, 0.0\] in row 1 \(1 such rows in all\)"):
        fusion(*inputs)


class Sum(nn.Module):
    def forward(self, main: torch.Tensor, aux: torch.Tensor) -> torch.Tensor:
        return main + aux


@pytest.mark.parametrize("execution", ["masked", "routed"])
def test_a_depth_that_is_read_late_is_checked(monkeypatch, execution):
    monkeypatch.setattr(RoutingPlan, "prefetch", unprefetched)
    parts = [[nn.Linear(FEATURES, FEATURES)] for _ in range(2)]
    fusion = NestedFusion(nn.Identity(), *parts, [Sum()], execution=execution)
    x = torch.randn(2, FEATURES)
    with pytest.raises(ValueError, match=r"depth must be in 0..1; got 2 in row 1"):
        fusion(x, x, depth=torch.tensor([1, 2]))
