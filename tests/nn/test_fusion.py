"""RoutedFusion: what runs, on which rows, with what gradient, and what it reports."""

import itertools
import math
from collections import Counter, OrderedDict, namedtuple

import pytest
import torch
from models import (
    FEATURES,
    MODES,
    Calls,
    FixedGate,
    Function,
    Planned,
    Touched,
    assert_close,
    assert_masked,
    assert_same,
    backward,
    blend,
    choosing,
    hard_weights,
    masked_fusion,
    mlp,
    relative_error,
    toy,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynmm_kernels import Branch, Lazy, RoutedFusion, Routing, Shared, ops, resource_loss

CHOICES = {
    "mixed": [0, 2, 1, 0, 2, 2, 1],
    "branch 1 starved": [0, 2, 0, 0, 2],
    "all to one": [1, 1, 1, 1],
    "one row": [2],
}
GATE_GRADS = ["straight_through", "selected", "none"]


def samples(n: int, features: int = FEATURES, dtype=torch.float64) -> Tensor:
    return torch.randn(n, features, dtype=dtype)


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


# What runs


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


# Outputs


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


# Inputs


class Mixture(nn.Module):
    """Reads three modalities of other shapes and another dtype."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.body, self.embedding = mlp(outputs), nn.Embedding(9, outputs).double()
        self.bilinear = nn.Bilinear(FEATURES, 4, outputs).double()

    def forward(self, x, image, token):
        return self.body(x) + self.bilinear(x, image.mean(2)) + self.embedding(token)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("execution", MODES)
def test_several_inputs(execution, choice):
    """Each of them in the order of its own branch's samples."""
    n = len(choice)
    gate, branches = Planned(Mixture(), torch.tensor(choice), 3), [Mixture() for _ in range(3)]
    inputs = samples(n), torch.randn(n, 4, 5, dtype=torch.float64), torch.randint(9, (n,))
    fusion = RoutedFusion(gate, branches, execution=execution)
    assert_masked(fusion, masked_fusion(gate, branches), [gate, *branches], inputs)


def test_the_gate_may_read_less_than_the_branches(call):
    gate = mlp(2, features=4)
    branches = [nn.Bilinear(FEATURES, 4, 3).double() for _ in range(2)]
    x, y = samples(7), samples(7, 4)
    expected = masked_fusion(lambda x, y: gate(y), branches)(x, y)
    fusion = RoutedFusion(Branch(gate, inputs=[1]), branches, execution="routed")
    assert_close(call(fusion, x, y), expected)


def test_a_scalar_is_not_per_sample(call):
    branches = [Function(lambda x, scale, b=b: x * scale + b) for b in range(2)]
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution="routed")
    x = samples(4)
    expected = 2 * x + torch.tensor([[0], [1], [1], [0]])
    assert_close(call(fusion, x, torch.tensor(2.0)), expected)


def test_only_what_a_branch_reads_is_touched():
    read, unread = samples(6), samples(6, 999)
    branches = [Branch(mlp(), inputs=["a"]), Branch(mlp(), inputs=["a"])]
    gate = Branch(choosing([0, 1, 0, 0, 1, 1], 2), inputs=["a"])
    for gate_grad in GATE_GRADS:
        fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
        with Touched() as touched:
            fusion({"a": read, "b": unread})
        assert read in touched
        assert unread not in touched


def test_a_modality_of_a_starved_branch_is_not_touched():
    cheap, costly = samples(6), samples(6, 999)
    branches = [
        Branch(mlp(), inputs=["cheap"]),
        Branch(mlp(features=999), inputs=["costly"]),
    ]
    gate = Branch(mlp(2), inputs=["cheap"])
    gate.module[2].bias.data[0] += 100
    fusion = RoutedFusion(gate, branches, execution="routed").eval()
    with torch.no_grad(), Touched() as touched:
        fusion({"cheap": cheap, "costly": costly})
    assert cheap in touched
    assert costly not in touched


class Recorder:
    """A fetch that notes the rows it is asked for."""

    def __init__(self, source: Tensor):
        self.source = source
        self.asked: list[list[int]] = []

    def __call__(self, rows: Tensor) -> Tensor:
        assert isinstance(rows, Tensor)
        assert rows.dtype is torch.int64
        assert rows.device.type == "cpu"
        assert rows.dim() == 1
        self.asked.append(rows.tolist())
        return self.source[rows]


def lazy_problem(choice: list[int], **options):
    """Branch 0 reads a tensor; 1 and 2 read the lazy modality too."""
    n = len(choice)
    fetch = Recorder(samples(n, 4))
    inputs = {"now": samples(n), "later": Lazy(fetch)}

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(features=FEATURES + 4)

        def forward(self, now, later):
            return self.body(torch.cat([now, later], 1))

    branches = [
        Branch(mlp(), inputs=["now"]),
        Branch(Both(), inputs=["now", "later"]),
        Branch(Both(), inputs=["now", "later"]),
    ]
    gate = Branch(choosing(choice, 3), inputs=["now"])
    return RoutedFusion(gate, branches, **options), inputs, fetch


@pytest.mark.parametrize("choice", [[0, 2, 1, 0, 2, 1, 1], [0, 0, 2, 2, 0], [1, 1, 1]])
def test_lazy_is_fetched_for_the_rows_that_need_it(choice):
    fusion, inputs, fetch = lazy_problem(choice, execution="routed")
    with torch.no_grad():
        output = fusion(inputs)
    wanted = [[n for n, b in enumerate(choice) if b == branch] for branch in (1, 2)]
    assert sorted(fetch.asked) == sorted(rows for rows in wanted if rows)
    whole = dict(inputs, later=fetch.source)
    with torch.no_grad():
        assert_close(output, fusion(whole))


def test_lazy_is_never_fetched_when_nobody_needs_it():
    fusion, inputs, fetch = lazy_problem([0, 0, 0], execution="routed", gate_grad="none")
    fusion(inputs)
    with torch.no_grad():
        fusion(inputs, choice=0)
    assert fetch.asked == []


@pytest.mark.parametrize("execution", MODES)
@pytest.mark.parametrize("choice", [[0, 2, 1, 0, 2], [0, 0, 0], [2, 2, 2]])
def test_lazy_training_equals_the_tensor(execution, choice):
    fusion, inputs, fetch = lazy_problem(choice, execution=execution)
    whole = dict(inputs, later=fetch.source)
    lazily = backward(lambda now: fusion(dict(inputs, now=now)), [fusion], (inputs["now"],))
    at_once = backward(lambda now: fusion(dict(whole, now=now)), [fusion], (inputs["now"],))
    assert_same(lazily, at_once)
    assert all(rows for rows in fetch.asked)


def test_lazy_alone_with_a_forced_choice():
    fetch = Recorder(samples(5))
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution="routed")
    choice = [2, 0, 0, -1, 2]
    output = fusion(Lazy(fetch), choice=torch.tensor(choice))
    for n, b in enumerate(choice):
        expected = branches[b](fetch.source)[n] if b >= 0 else torch.zeros(3).double()
        assert_close(output[n], expected)
    assert sorted(fetch.asked) == [[0, 4], [1, 2]]


def test_lazy_read_by_the_gate_is_fetched_whole():
    fetch = Recorder(samples(4))
    gate, branches = toy()
    branches = [Branch(branch, inputs=[0]) for branch in branches]
    fusion = RoutedFusion(Branch(gate, inputs=[1]), branches, execution="routed")
    with torch.no_grad():
        fusion(samples(4), Lazy(fetch))
    assert fetch.asked == [[0, 1, 2, 3]]


def first_tensor(inputs) -> Tensor:
    return next(x for x in tree_leaves(inputs) if isinstance(x, Tensor))


# name -> selector, how the fusion is called, whether the branch reads the image too
SELECTORS = {
    "keys": (["text", "image"], lambda d: (d,), True),
    "tuple of keys": (("text", "image"), lambda d: (d,), True),
    "one key": (["text"], lambda d: (d,), False),
    "positions of arguments": ([1, 0], lambda d: (d["image"], d["text"]), True),
    "positions of one list": ([1, 0], lambda d: ([d["image"], d["text"]],), True),
    "position of one tuple": ([1], lambda d: ((d["image"], d["text"]),), False),
    "callable, tuple": (lambda d: (d["text"], d["image"]), lambda d: (d,), True),
    "callable, tensor": (lambda d: d["text"], lambda d: (d,), False),
    "callable of two": (lambda i, t: (t, i), lambda d: (d["image"], d["text"]), True),
}


@pytest.mark.parametrize(("selector", "pack", "both"), SELECTORS.values(), ids=SELECTORS)
@pytest.mark.parametrize("execution", MODES)
def test_selectors(execution, selector, pack, both, call):
    """Every way of naming the modalities calls the branch as branch(text[, image])."""
    data = {"text": samples(5, 2), "image": samples(5, 3)}

    def reader(text, image=None):
        assert text.shape[1] == 2
        assert (image is not None) is both
        return text.sum(1) if image is None else text.sum(1) + 10 * image.sum(1)

    other = Function(lambda *inputs: torch.zeros_like(first_tensor(inputs)[:, 0]))
    gate = Branch(choosing([0, 1, 1, 0, 1], 2), inputs=lambda *inputs: first_tensor(inputs))
    fusion = RoutedFusion(gate, [Branch(Function(reader), inputs=selector), other])
    fusion.execution = execution
    expected = reader(data["text"], data["image"] if both else None)
    expected[[1, 2, 4]] = 0
    assert_close(call(fusion, *pack(data)), expected)


@pytest.mark.parametrize("execution", MODES)
def test_the_authors_nested_packs(execution, call):
    """[[video, audio, text], [their lengths]]: a list from a callable is one argument."""
    n, widths = 6, (2, 3, 4)
    pack = [[samples(n, w) for w in widths], [torch.randint(1, 9, (n,)) for _ in widths]]

    class Text(nn.Module):
        def forward(self, x):
            text, lengths = x
            return text.sum(1) / lengths

    class Everything(nn.Module):
        def forward(self, x):
            return sum(m.sum(1) / lengths for m, lengths in zip(*x, strict=True))

    class Gate(nn.Module):
        def forward(self, x):
            sequences, lengths = x
            assert len(sequences) == len(lengths) == 3
            return torch.stack([sequences[0].sum(1), sequences[1].sum(1)], dim=1)

    text = Branch(Text(), inputs=lambda x: [x[0][2], x[1][2]])
    fusion = RoutedFusion(Gate(), [text, Everything()], execution=execution)
    chosen = Gate()(pack).argmax(1)
    assert 0 < chosen.sum() < n
    expected = torch.where(chosen == 0, Text()([pack[0][2], pack[1][2]]), Everything()(pack))
    assert_close(call(fusion, pack), expected)


def test_containers_keep_their_type(call):
    Pair = namedtuple("Pair", "left right")

    def check(pair, mapping):
        assert type(pair) is Pair
        assert type(mapping) is OrderedDict
        assert list(mapping) == ["z", "a"]
        assert isinstance(mapping["z"], tuple)
        return pair.left + mapping["z"][0] + mapping["a"]

    x = samples(4)
    inputs = Pair(x, None), OrderedDict(z=(x, 3), a=x)
    branches = [Function(check), Function(check)]
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution="routed")
    assert_close(call(fusion, *inputs), 3 * x)


@pytest.mark.parametrize("execution", MODES)
def test_what_is_not_per_sample_passes(execution):
    """Shared tensors, also of N rows, 0-dim tensors, None, numbers, strings."""
    n = 4
    shared, scalar = samples(n), torch.tensor(2.0)
    seen = []

    def branch(x, table, scale, nothing, number, word, flag):
        seen.append(len(x))
        assert table.data_ptr() == shared.data_ptr()
        assert table.shape == shared.shape
        assert (nothing, number, word, flag) == (None, 3, "mean", True)
        return x * scale * table.sum()

    inputs = (x := samples(n), Shared(shared), scalar, None, 3, "mean", True)
    gate = Branch(choosing([0, 1, 1, 1], 2), inputs=[0])
    fusion = RoutedFusion(gate, [Function(branch), Function(branch)], execution=execution)
    with torch.no_grad():
        assert_close(fusion(*inputs), 2 * x * shared.sum())
    assert seen == ([4, 4] if execution == "masked" else [1, 3])


def test_shared_tensors_get_gradients():
    gate, branches = choosing([0, 1, 1, 0], 2), toy(num_branches=2)[1]

    class Scaled(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x, scale):
            return self.body(x) * scale

    branches = [Scaled(branch) for branch in branches]
    modules = [gate, *branches]
    inputs = (samples(4), samples(1, 3)[0])
    expected = backward(masked_fusion(gate, branches), modules, inputs)
    fusion = RoutedFusion(gate, branches, execution="routed")
    actual = backward(lambda x, scale: fusion(x, Shared(scale)), modules, inputs)
    assert_same(actual, expected)


def test_the_gate_gets_what_is_shared_unwrapped(call):
    table = samples(3)

    def gate(x, shared):
        assert shared is table
        return x[:, :2]

    branches = [Function(lambda x, shared: x)] * 2
    x = samples(4)
    fusion = RoutedFusion(Function(gate), branches, execution="routed")
    assert_close(call(fusion, x, Shared(table)), x)


@pytest.mark.parametrize("select", [1, "multi_hot"])
def test_what_a_callable_selects_keeps_its_graph(backend, select):
    """Also where a branch runs without one first, on the samples it was not chosen for."""
    x = torch.randn(6, FEATURES, dtype=torch.float64, requires_grad=True)
    gate, branches = toy(3)
    parts = [Branch(branch, inputs=lambda x: 2 * x) for branch in branches]
    fusion = RoutedFusion(gate, parts, select=select)
    grads = []
    for execution in ("routed", "masked"):
        fusion.execution = execution
        grads.append(torch.autograd.grad(fusion(x).square().sum(), x))
    torch.testing.assert_close(*grads)


def test_as_many_choices_as_samples(backend):
    """One sample takes both branches and one none: the rest of one is not what the other has."""
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    logits = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]).double()
    gate, branches = FixedGate(logits), [mlp(3) for _ in range(2)]
    fusion = RoutedFusion(gate, branches, select="multi_hot")
    modules = [gate, *branches]
    routed = backward(fusion, modules, [x])
    fusion.execution = "masked"
    assert_same(routed, backward(fusion, modules, [x]))


@pytest.mark.parametrize("count", [2, 3])
def test_a_training_step_gathers_every_row_once(count, monkeypatch):
    """With two branches, whose samples are each other's rest; the backward pass gathers its own."""
    moved = []
    kernels = ops.kernels()

    class Counting:
        def __getattr__(self, name):
            def call(*arguments, **named):
                result = getattr(kernels, name)(*arguments, **named)
                if name == "gather_rows":
                    moved.append(sum(len(rows) for rows in result))
                return result

            return call

    monkeypatch.setattr(ops, "kernels", Counting)
    _, branches = toy(count)
    gate = choosing([n % count for n in range(32)], count)
    x = torch.randn(32, FEATURES, dtype=torch.float64)
    output, routing = RoutedFusion(gate, branches)(x, return_routing=True)
    assert sum(moved) == (32 if count == 2 else 32 * count)
    output.sum().backward()
    assert routing.rows_run == (32,) * count


def test_what_a_branch_writes_into_the_rows_of_others(backend):
    """A write that no attribute tells of: the samples are gathered again."""
    x = torch.randn(6, FEATURES, dtype=torch.float64)
    gate, branches = toy(2)
    writing = Function(lambda rows: rows.mul_(2) @ torch.ones(FEATURES, 3).double())
    plain = Function(lambda rows: (rows * 2) @ torch.ones(FEATURES, 3).double())
    choice = torch.tensor([0, 1, 1, 0, 1, 0])
    gate = choosing(choice.tolist(), 2)
    results = [
        backward(RoutedFusion(gate, [branches[0], second]), [gate, branches[0]], [x.clone()])
        for second in (writing, plain)
    ]
    assert_same(*results)


@pytest.mark.parametrize("mode", MODES)
def test_who_takes_the_only_branch_may_be_bools_of_the_samples(mode):
    gate, branches = toy(1)
    x = torch.randn(6, FEATURES, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, False])
    fusion = RoutedFusion(gate, branches, execution=mode)
    output, routing = fusion(x, choice=mask, return_routing=True)
    assert_close(output, branches[0](x) * mask.unsqueeze(1))
    assert routing.counts == (3,)
