"""RoutedFusion: its modes and their gradients, choices, noise, and what it reports."""

import math

import pytest
import torch
from models import (
    CHOICES,
    FEATURES,
    GATE_GRADS,
    MODES,
    Calls,
    FixedGate,
    Function,
    assert_close,
    assert_masked,
    assert_same,
    backward,
    blend,
    choosing,
    masked_fusion,
    mlp,
    relative_error,
    samples,
    toy,
)
from torch import Tensor

from dynmm_kernels import Branch, RoutedFusion, Routing, resource_loss


def zero_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and not parameter.grad.any()


# Modes and their gradients


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("execution", MODES)
def test_hard_modes_equal_masked_autograd(execution, choice):
    gate, branches = choosing(choice, 3), toy()[1]
    x = (samples(len(choice)),)
    fusion = RoutedFusion(gate, branches, execution=execution)
    masked = masked_fusion(gate, branches)
    with torch.no_grad():
        assert_close(fusion(*x), masked(*x))
    assert_masked(fusion, masked, [gate, *branches], x)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("execution", MODES)
def test_temperature_reaches_the_gradient_not_the_choice(execution, temperature):
    gate, branches = toy()
    x = (samples(9),)
    fusion = RoutedFusion(gate, branches, execution=execution, temperature=temperature)
    assert_masked(fusion, masked_fusion(gate, branches, temperature), [gate, *branches], x)
    routing = fusion(*x, return_routing=True)[1]
    logits = gate(*x)
    assert torch.equal(routing.choice, logits.argmax(1))
    assert_close(routing.probs, torch.softmax(logits / temperature, 1))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_dense_is_the_soft_sum(temperature):
    gate, branches = toy()
    x = (samples(9),)
    fusion = RoutedFusion(gate, branches, execution="dense", temperature=temperature)

    def soft(x):
        return blend(torch.softmax(gate(x) / temperature, 1), [branch(x) for branch in branches])

    assert_masked(fusion, soft, [gate, *branches], x)


def test_modes_can_be_changed_between_calls(call):
    gate, branches = toy()
    x = samples(9)
    fusion = RoutedFusion(gate, branches)
    state = set(fusion.state_dict())
    hard = masked_fusion(gate, branches)(x)
    for execution in ("routed", "masked", "auto", "routed"):
        fusion.execution = execution
        assert_close(call(fusion, x), hard)
    fusion.execution = "dense"
    assert relative_error(call(fusion, x), hard) > 1e-3
    assert set(fusion.state_dict()) == state


def test_ties_go_to_the_first_branch_as_in_argmax():
    branches = toy()[1]
    x = samples(4)
    for execution in MODES:
        fusion = RoutedFusion(FixedGate(torch.zeros(4, 3)), branches, execution=execution)
        assert fusion(x, return_routing=True)[1].choice.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("execution", MODES)
def test_other_precisions_keep_their_dtype(execution, dtype, call):
    gate, branches = toy(dtype=dtype)
    x = samples(9, dtype=dtype)
    output = call(RoutedFusion(gate, branches, execution=execution), x)
    assert output.dtype is dtype
    rows = torch.stack([branches[b](x)[n] for n, b in enumerate(gate(x).argmax(1))])
    assert relative_error(output, rows) <= 4 * torch.finfo(dtype).eps


# Forced choices


@pytest.mark.parametrize("execution", MODES)
def test_choice_int(execution, call):
    gate, branches = toy()
    gate_calls = Calls.of([gate])
    fusion = RoutedFusion(gate, branches, execution=execution)
    x = samples(5)
    for b, branch in enumerate(branches):
        assert_close(call(fusion, x, choice=b), branch(x))
    assert gate_calls.rows == [[]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("execution", MODES)
def test_choice_tensor_with_holes(execution, dtype):
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution=execution)
    choice = [1, -1, 0, 1, -1]
    x = samples(5).requires_grad_()
    output, routing = fusion(x, choice=torch.tensor(choice, dtype=dtype), return_routing=True)
    for n, b in enumerate(choice):
        expected = branches[b](x)[n] if b >= 0 else torch.zeros(3, dtype=torch.float64)
        assert_close(output[n], expected)
    assert routing.choice.tolist() == choice
    assert routing.choice.dtype is torch.int64
    assert routing.probs is None
    assert routing.counts == (1, 2, 0)
    output.sum().backward()
    assert torch.equal(x.grad[[1, 4]], torch.zeros(2, FEATURES, dtype=torch.float64))
    assert all(p.grad is None for p in gate.parameters())
    assert all(zero_gradient(p) for p in branches[2].parameters())


@pytest.mark.parametrize("execution", MODES)
def test_no_sample_has_a_branch(execution, call):
    fusion = RoutedFusion(*toy(), execution=execution)
    output = call(fusion, samples(4), choice=torch.full((4,), -1))
    assert torch.equal(output, torch.zeros(4, 3, dtype=torch.float64))


def test_forced_choice_gradients_equal_masked():
    gate, branches = toy()
    x = (samples(7),)
    choice = torch.tensor([0, 2, -1, 2, 2, 0, -1])
    results = []
    for execution in ("masked", "routed"):
        fusion = RoutedFusion(gate, branches, execution=execution)
        results.append(backward(lambda x, f=fusion: f(x, choice=choice), branches, x))
    assert_same(results[1], results[0])
    assert all(g is not None for g in results[1].all())


# Routing


def test_routing_facts():
    gate, branches = choosing([0, 2, 2, 0, 2], 3), toy()[1]
    branches = [Branch(b, cost=cost) for b, cost in zip(branches, (1.0, 10.0, 100.0), strict=True)]
    fusion = RoutedFusion(gate, branches, execution="routed").eval()
    with torch.no_grad():
        output, routing = fusion(samples(5), return_routing=True)
    assert isinstance(routing, Routing)
    assert routing.choice.tolist() == [0, 2, 2, 0, 2]
    assert routing.choice.dtype is torch.int64
    assert routing.counts == (2, 0, 3)
    assert routing.fractions == (0.4, 0.0, 0.6)
    assert routing.rows_run == (2, 0, 3)
    assert routing.plan.counts == (2, 0, 3)
    assert routing.executed_cost == pytest.approx((2 * 1 + 3 * 100) / 5)
    probs = torch.softmax(gate.logits, 1)
    assert_close(routing.probs, probs.detach())
    costs = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    assert_close(routing.expected_cost.double(), (probs.detach() @ costs).mean())
    assert torch.equal(routing.weights.argmax(1), routing.choice)
    assert routing.weights.sum() == 5
    assert output.shape == (5, 3)


def test_routing_of_the_other_modes():
    gate, branches = choosing([0, 2, 2], 3), toy()[1]
    branches = [Branch(b, cost=cost) for b, cost in zip(branches, (1.0, 10.0, 100.0), strict=True)]
    fusion = RoutedFusion(gate, branches, execution="masked")
    masked = fusion(samples(3), return_routing=True)[1]
    assert masked.counts == (1, 0, 2)
    assert masked.rows_run == (3, 3, 3)
    assert masked.executed_cost == pytest.approx(111)
    fusion.execution = "dense"
    dense = fusion(samples(3), return_routing=True)[1]
    assert dense.choice is None
    assert dense.plan is None
    assert dense.rows_run == (3, 3, 3)
    assert_close(dense.weights, torch.softmax(gate.logits, 1))


def test_routing_without_costs():
    routing = RoutedFusion(*toy())(samples(3), return_routing=True)[1]
    assert routing.expected_cost is None
    assert routing.executed_cost is None


def test_a_forced_choice_pays_no_gate():
    branches = [
        Branch(branch, cost=cost) for branch, cost in zip(toy(2)[1], (1.0, 2.0), strict=True)
    ]
    fusion = RoutedFusion(Branch(choosing([0, 1, 1], 2), cost=5.0), branches).eval()
    with torch.no_grad():
        forced = fusion(samples(3), choice=1, return_routing=True)[1]
        asked = fusion(samples(3), return_routing=True)[1]
    assert (forced.gate_cost, forced.executed_cost) == (0.0, 2.0)
    assert asked.executed_cost == pytest.approx(5 / 3 + 5)


@pytest.mark.parametrize("execution", ["dense", *MODES])
def test_expected_cost_is_differentiable(execution):
    gate, branches = toy()
    costs = (3.0, 5.0, 11.0)
    branches = [Branch(b, cost=c) for b, c in zip(branches, costs, strict=True)]
    fusion = RoutedFusion(gate, branches, execution=execution)
    x = samples(6)
    actual = torch.autograd.grad(
        fusion(x, return_routing=True)[1].expected_cost, list(gate.parameters())
    )
    table = torch.tensor(costs, dtype=torch.float64)
    expected = torch.autograd.grad(
        (torch.softmax(gate(x), 1) @ table).mean(), list(gate.parameters())
    )
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= 1e-10


@pytest.mark.parametrize("execution", ["dense", *MODES])
@pytest.mark.parametrize("budget", [None, 4.0, 1000.0])
def test_resource_loss(execution, budget):
    """mean over samples of weights . costs, hinged at the budget, with the gate's gradient."""
    costs = (1.0, 10.0, 100.0)
    gate = choosing([0, 2, 1, 2], 3)
    fusion = RoutedFusion(gate, toy()[1], execution=execution)
    routing = fusion(samples(4), return_routing=True)[1]
    loss = resource_loss(routing, costs=costs, budget=budget)
    table = torch.tensor(costs, dtype=torch.float64)
    probs = torch.softmax(gate.logits, 1)
    value = (probs @ table).mean().item() if execution == "dense" else (1 + 100 + 10 + 100) / 4
    assert loss.item() == pytest.approx(max(0, value - (budget or 0)))
    actual = torch.autograd.grad(loss, gate.logits)[0]
    if budget == 1000.0:
        assert not actual.any()
    else:
        expected = torch.autograd.grad((probs @ table).mean(), gate.logits)[0]
        assert relative_error(actual, expected) <= 1e-10


def test_resource_loss_takes_the_branches_costs():
    branches = [Branch(b, cost=c) for b, c in zip(toy()[1], (1.0, 2.0, 4.0), strict=True)]
    fusion = RoutedFusion(choosing([2, 2, 0], 3), branches)
    assert resource_loss(fusion(samples(3), return_routing=True)[1]).item() == pytest.approx(3)


# Noise


def test_gumbel_noise_is_off_in_eval_and_seeded_in_training():
    gate, branches = toy()
    x = samples(200)
    fusion = RoutedFusion(gate, branches, execution="routed", noise="gumbel")

    def choice(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return fusion(x, return_routing=True, generator=generator)[1].choice.tolist()

    quiet = gate(x).argmax(1).tolist()
    assert choice(1) == choice(1) != choice(2)
    assert choice(1) != quiet
    fusion.eval()
    assert choice(1) == choice(2) == quiet
    fusion.train()
    fusion.noise = None
    assert choice(1) == quiet


@pytest.mark.parametrize("execution", MODES)
def test_gumbel_choices_follow_the_softmax(execution):
    """Each frequency within 5 standard deviations of its probability."""
    n = 40_000
    logits = torch.tensor([1.0, -0.5, 0.3, -3.0])
    branches = [Function(lambda x, b=b: x + b) for b in range(4)]
    gate = FixedGate(logits.expand(n, 4).clone())
    fusion = RoutedFusion(gate, branches, execution=execution, noise="gumbel")
    generator = torch.Generator().manual_seed(3)
    counts = fusion(torch.zeros(n, 1), return_routing=True, generator=generator)[1].counts
    for count, p in zip(counts, torch.softmax(logits, 0).tolist(), strict=True):
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def test_gumbel_gradients_equal_masked_for_the_same_draw():
    gate, branches = toy()
    x = (samples(50),)
    results = []
    for execution in ("masked", "routed"):
        fusion = RoutedFusion(gate, branches, execution=execution, noise="gumbel", temperature=0.7)

        def fuse(x, fusion=fusion):
            return fusion(x, generator=torch.Generator().manual_seed(5))

        results.append(backward(fuse, [gate, *branches], x))
    assert_same(results[1], results[0])


# Gradients of the gate


def test_straight_through_complement():
    """Every branch sees every row once; rows that did not choose it get exactly zero from it."""
    choice = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    own = [samples(7).requires_grad_() for _ in range(2)]
    branches = [Branch(mlp(), inputs=[0]), Branch(mlp(), inputs=[1])]
    calls = Calls.of(branch.module for branch in branches)
    gate = choosing(choice.tolist(), 2)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad="straight_through")
    output, routing = fusion(*own, return_routing=True)
    assert routing.rows_run == (7, 7)
    assert routing.counts == (3, 4)
    assert calls.total() == [7, 7]
    output.square().sum().backward()
    for b, x in enumerate(own):
        assert torch.equal(x.grad[choice != b], torch.zeros_like(x[choice != b]))
        assert x.grad[choice == b].abs().min() > 0


def test_selected_is_the_mixture_of_experts_gradient():
    """dL/dz_j = p_a (delta_aj - p_j) <g, f_a> / temperature, for the chosen branch a."""
    gate, branches = choosing([0, 2, 1, 0, 2], 3), toy()[1]
    x, upstream, temperature = samples(5), samples(5, 3), 0.7
    fusion = RoutedFusion(
        gate, branches, execution="routed", gate_grad="selected", temperature=temperature
    )
    output, routing = fusion(x, return_routing=True)
    assert routing.rows_run == (2, 1, 2)
    output.backward(upstream)
    p = torch.softmax(gate.logits.detach() / temperature, 1)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for n, a in enumerate(routing.choice.tolist()):
        dot = upstream[n] @ branches[a](x)[n].detach()
        for j in range(3):
            expected[n, j] = p[n, a] * (float(a == j) - p[n, j]) * dot / temperature
    assert relative_error(gate.logits.grad, expected) <= 1e-12


@pytest.mark.parametrize("gate_grad", ["selected", "none"])
def test_branch_gradients_do_not_depend_on_gate_grad(gate_grad):
    gate, branches = choosing([0, 2, 2, 0, 2], 3), toy()[1]
    x = (samples(5),)
    expected = backward(masked_fusion(gate, branches), branches, x)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
    actual = backward(fusion, branches, x)
    assert_same(actual, expected)
    assert all(g is not None for g in actual.parameters)


@pytest.mark.parametrize("execution", MODES)
def test_none_gives_the_gate_no_gradient(execution):
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution=execution, gate_grad="none")
    output, routing = fusion(samples(6), return_routing=True)
    output.sum().backward()
    assert all(p.grad is None for p in gate.parameters())
    assert all(p.grad is not None for b in branches for p in b.parameters())
    if execution == "routed":
        assert routing.rows_run == routing.counts


@pytest.mark.parametrize("why", ["no_grad", "inference_mode", "frozen gate", "forced choice"])
def test_no_complement_where_the_gate_cannot_learn(why):
    gate, branches = choosing([0, 1, 1, 1, 0], 3), toy()[1]
    calls = Calls.of(branches)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad="straight_through")
    gate.requires_grad_(why != "frozen gate")
    forced = {"choice": torch.tensor([0, 1, 1, 1, 0])} if why == "forced choice" else {}
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with context.get(why, torch.enable_grad)():
        routing = fusion(samples(5), return_routing=True, **forced)[1]
    assert calls.rows == [[2], [3], []]
    assert routing.rows_run == (2, 3, 0)


def test_a_frozen_gate_still_passes_gradients_to_its_inputs():
    """What counts is whether a graph goes through the logits, not whose parameters learn."""
    gate, branches = toy()
    gate.requires_grad_(False)
    x = (samples(6),)
    expected = backward(masked_fusion(gate, branches), branches, x)
    actual = backward(RoutedFusion(gate, branches, execution="routed"), branches, x)
    assert_same(actual, expected)


def test_eval_with_a_graph_learns_too():
    gate, branches = toy()
    x = (samples(6),)
    modules = [gate, *branches]
    fusion = RoutedFusion(gate, branches, execution="routed").eval()
    expected = backward(masked_fusion(gate, branches), modules, x)
    assert_same(backward(fusion, modules, x), expected)


@pytest.mark.parametrize("gate_grad", GATE_GRADS)
@pytest.mark.parametrize("execution", MODES)
def test_starved_branches_get_zero_gradients(execution, gate_grad):
    gate, branches = choosing([1, 1, 1], 3), toy()[1]
    fusion = RoutedFusion(gate, branches, execution=execution, gate_grad=gate_grad)
    fusion(samples(3)).square().sum().backward()
    for b in (0, 2):
        assert all(zero_gradient(p) for p in branches[b].parameters())
    assert all(p.grad.any() for p in branches[1].parameters())


@pytest.mark.parametrize("gate_grad", GATE_GRADS)
@pytest.mark.parametrize("execution", MODES)
def test_what_only_a_starved_branch_reads_gets_zeros(execution, gate_grad):
    read, unread = (samples(3).requires_grad_() for _ in range(2))
    branches = [Branch(mlp(), inputs=[0]), Branch(mlp(), inputs=[1])]
    fusion = RoutedFusion(choosing([0, 0, 0], 2), branches, execution=execution)
    fusion.gate_grad = gate_grad
    fusion(read, unread).square().sum().backward()
    assert read.grad.any()
    assert zero_gradient(unread)


def training_curve(execution: str, steps: int = 20) -> tuple[list[float], set[tuple], list]:
    """Losses of AdamW, the splits on the way, the trained parameters."""
    torch.manual_seed(4)
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution=execution)
    optimizer = torch.optim.AdamW(fusion.parameters(), lr=1e-2, weight_decay=0.1)
    losses, splits = [], set()
    for step in range(steps):
        x = torch.randn(8, FEATURES, dtype=torch.float64)
        if step % 4 == 1:
            x = x[:1].expand(8, -1)  # one decision for all: two branches starve
        output, routing = fusion(x, return_routing=True)
        loss = (output - x[:, :3].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        splits.add(routing.counts)
    return losses, splits, [p.detach() for p in fusion.parameters()]


def test_training_curves_with_starved_batches():
    masked, splits, masked_parameters = training_curve("masked")
    routed, routed_splits, routed_parameters = training_curve("routed")
    assert splits == routed_splits
    assert any(0 in counts for counts in splits)
    assert any(0 not in counts for counts in splits)
    assert routed == pytest.approx(masked, rel=1e-9)
    for a, e in zip(routed_parameters, masked_parameters, strict=True):
        assert relative_error(a, e) <= 1e-8


def test_without_a_gate_every_call_brings_a_choice(call):
    branches = toy(2)[1]
    fusion, x = RoutedFusion(None, branches), samples(5)
    choice = torch.tensor([0, 1, 1, -1, 0])
    wanted = RoutedFusion(FixedGate(torch.zeros(5, 2)), branches)
    assert_close(call(fusion, x, choice=choice), call(wanted, x, choice=choice))
    for eval_mode in (False, True):
        fusion.train(not eval_mode)
        with pytest.raises(ValueError, match="wanted choice=, because it has no gate"):
            call(fusion, x)
    fusion.gate = lambda x: torch.tensor([[0.0, 1.0]]).expand(len(x), 2)
    assert_close(call(fusion, x), branches[1](x))
