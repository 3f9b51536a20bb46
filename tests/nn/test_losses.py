"""Losses against gate collapse, against their formulas sample by sample."""

import math

import pytest
import torch
from models import FixedGate, Function, assert_close, toy
from torch import Tensor, nn

from dynmm_kernels import (
    ChainedFusion,
    NestedFusion,
    RoutedFusion,
    balance_loss,
    entropy_loss,
    resource_loss,
)

N, B = 11, 4
LOSSES = [balance_loss, entropy_loss, lambda routing: entropy_loss(routing, local=0.7)]
for_losses = pytest.mark.parametrize("loss", LOSSES, ids=["balance", "entropy", "both entropies"])


def routed(logits: Tensor, choice=None, **settings):
    """The parameter that a gate returns, and the routing."""
    gate = FixedGate(logits.clone())
    fusion = RoutedFusion(gate, [nn.Identity() for _ in range(logits.shape[1])], **settings)
    given = {} if choice is None else {"choice": choice}
    x = torch.zeros(len(logits), 1, dtype=logits.dtype)
    return gate.logits, fusion(x, return_routing=True, **given)[1]


def nested(logits: Tensor, depth=None, **settings):
    stages = [nn.Identity() for _ in range(6)]
    gate, joins = FixedGate(logits.clone()), [Function(lambda main, aux: main + aux)] * 3
    stack = NestedFusion(gate, stages[:3], stages[3:], joins, **settings)
    x = torch.zeros(len(logits), 1, dtype=logits.dtype)
    given = {} if depth is None else {"depth": depth}
    return gate.logits, stack(x, x, return_routing=True, **given)[1]


def decisions(logits: Tensor, select, dense: bool) -> tuple[list[Tensor], list[float]]:
    """Each sample's probabilities, and the share of every branch in what was chosen."""
    shares, counts = [], [0.0] * B
    for row in logits:
        if select == "multi_hot":
            p = row.sigmoid() / row.sigmoid().sum()
            taken = [b for b in range(B) if row[b] > 0]
        else:
            p = row.softmax(0)
            taken = sorted(range(B), key=lambda b: -float(row[b].detach()))[:select]
        shares.append(p)
        for b in range(B):
            counts[b] += float(p[b].detach()) if dense else float(b in taken)
    return shares, [count / max(1.0, sum(counts)) for count in counts]


def formula(loss, shares: list[Tensor], fractions: list[float]) -> Tensor:
    mean = sum(shares) / len(shares)
    if loss is balance_loss:
        return len(mean) * sum(f * p for f, p in zip(fractions, mean, strict=True))
    total = sum(p * p.log() for p in mean)
    if loss is not entropy_loss:
        total = total - 0.7 * sum((row * row.log()).sum() for row in shares) / len(shares)
    return total


@for_losses
@pytest.mark.parametrize("execution", ["routed", "masked", "dense"])
@pytest.mark.parametrize("select", [1, 2, "multi_hot"])
def test_losses_are_their_formulas(loss, select, execution, backend):
    values = torch.randn(N, B, dtype=torch.float64)
    logits, routing = routed(values, select=select, execution=execution)
    actual = loss(routing)
    expected = formula(loss, *decisions(logits, select, execution == "dense"))
    assert_close(actual, expected)
    assert_close(*(torch.autograd.grad(x, logits)[0] for x in (actual, expected)))
    assert actual.dtype == torch.float64


@for_losses
@pytest.mark.parametrize("execution", ["routed", "masked", "dense"])
def test_losses_of_depths(loss, execution):
    logits, routing = nested(torch.randn(N, B, dtype=torch.float64), execution=execution)
    actual = loss(routing)
    expected = formula(loss, *decisions(logits, 1, execution == "dense"))
    assert_close(actual, expected)
    assert_close(*(torch.autograd.grad(x, logits)[0] for x in (actual, expected)))


def test_even_use_is_the_least_and_collapse_the_most():
    even = 50 * torch.eye(B, dtype=torch.float64)
    collapsed = even[:1].expand(B, -1)
    undecided = torch.zeros(B, B, dtype=torch.float64)

    def value(loss, logits, **given):
        return loss(routed(logits)[1], **given).item()

    assert value(balance_loss, even) == pytest.approx(1)
    assert value(balance_loss, collapsed) == pytest.approx(B)
    assert value(entropy_loss, even) == pytest.approx(-math.log(B))
    assert value(entropy_loss, collapsed) == pytest.approx(0)
    assert value(entropy_loss, undecided, local=1) == pytest.approx(0)  # no information
    assert value(entropy_loss, even, local=1) == pytest.approx(-math.log(B))


@for_losses
@pytest.mark.parametrize("select", [1, "multi_hot"])
def test_descent_wakes_a_forgotten_branch(loss, select):
    torch.manual_seed(0)
    values = torch.randn(64, B, dtype=torch.float64) + torch.tensor([0.0, 0.0, 0.0, -3.0])
    assert routed(values, select=select)[1].counts[3] == 0
    for _ in range(300):
        logits, routing = routed(values, select=select)
        (gradient,) = torch.autograd.grad(loss(routing), logits)
        values = values - 20 * gradient
    assert routed(values, select=select)[1].fractions[3] > 0.05


@for_losses
def test_several_routings_are_summed(loss):
    one, other = (routed(torch.randn(N, size, dtype=torch.float64))[1] for size in (2, 5))
    assert_close(loss([one, other]), loss(one) + loss(other))
    assert_close(loss((one,)), loss(one))


@for_losses
def test_an_empty_batch_costs_nothing_and_keeps_its_graph(loss):
    logits, routing = routed(torch.randn(0, B, dtype=torch.float64))
    loss(routing).backward()
    assert float(loss(routing)) == 0
    assert logits.grad.shape == (0, B)


def test_one_sample():
    logits, routing = routed(torch.tensor([[0.0, 2.0, 0.0, 0.0]], dtype=torch.float64))
    assert_close(balance_loss(routing), B * logits.softmax(1)[0, 1])


@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_a_forced_choice_is_told_but_teaches_nobody(execution):
    choice = torch.tensor([0, 0, 0, 1, -1])
    values = torch.randn(5, B)
    _, routing = routed(values, choice=choice, execution=execution)
    assert float(balance_loss(routing)) == pytest.approx(B * (0.75**2 + 0.25**2))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(entropy_loss(routing, local=5.0)) == pytest.approx(-entropy)
    assert not balance_loss(routing).requires_grad
    _, routing = nested(values, depth=torch.tensor([0, 1, 2, 3, 3]))
    assert float(balance_loss(routing)) == pytest.approx(B * (3 * 0.2**2 + 0.4**2))
    _, routing = routed(values, choice="uniform")
    assert float(balance_loss(routing)) == pytest.approx(1)
    assert float(entropy_loss(routing)) == pytest.approx(-math.log(B))


@for_losses
@pytest.mark.parametrize("returns", ["probabilities", "weights"])
def test_gates_that_return_no_logits(loss, returns):
    soft = torch.randn(N, B, dtype=torch.float64).softmax(1)
    hard = torch.nn.functional.one_hot(soft.argmax(1), B).double()
    values, routing = routed(soft if returns == "probabilities" else hard, gate_returns=returns)
    loss(routing).backward()
    shares = [*values.detach()]
    if returns == "probabilities":
        fractions = [float(x) for x in hard.mean(0)]
        assert_close(loss(routing), formula(loss, shares, fractions))
    assert values.grad.isfinite().all()


@for_losses
@pytest.mark.parametrize("select", [1, "multi_hot"])
def test_certain_gates_have_finite_gradients(loss, select):
    logits, routing = routed(torch.tensor([[500.0, -500.0], [900.0, -900.0]]), select=select)
    loss(routing).backward()
    assert logits.grad.isfinite().all()


@for_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_fp32(loss, dtype):
    values = torch.randn(4096, B).to(dtype)
    low, high = routed(values)[1], routed(values.double())[1]
    assert loss(low).dtype == torch.float32
    assert float(loss(low)) == pytest.approx(float(loss(high)), rel=2e-2)


def test_nothing_waits_for_the_device(monkeypatch):
    _, routing = routed(torch.randn(N, B))
    for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("waited for the device"))
    for loss in LOSSES:
        loss(routing)


def chained():
    gate, stage = FixedGate(torch.randn(3, 2)), nn.Identity()
    chain = ChainedFusion([gate], [stage], [stage], [Function(lambda main, aux: main)])
    return chain(torch.zeros(3, 1), torch.zeros(3, 1), return_routing=True)[1]


@pytest.mark.parametrize("name", ["resource_loss", "balance_loss", "entropy_loss"])
def test_what_is_no_routing_is_named(name):
    loss = {f.__name__: f for f in (resource_loss, balance_loss, entropy_loss)}[name]
    _, routing = RoutedFusion(*toy(2))(torch.randn(3, 6).double(), return_routing=True)
    with pytest.raises(TypeError, match=f"{name}: wanted a Routing.*got NoneType"):
        loss([routing, None])
    with pytest.raises(ValueError, match=f"{name}: wanted at least one routing"):
        loss([])


@pytest.mark.parametrize("loss", [balance_loss, entropy_loss])
def test_a_chain_is_refused(loss):
    with pytest.raises(ValueError, match=f"{loss.__name__}: a ChainedFusion .* routing.keep"):
        loss(chained())


@pytest.mark.parametrize("local", [-1, float("nan"), "all", None])
def test_a_wrong_weight_of_the_local_entropy(local):
    with pytest.raises(ValueError, match="local must be a number >= 0; got"):
        entropy_loss(routed(torch.randn(N, B))[1], local)
