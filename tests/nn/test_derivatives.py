"""Derivatives of modules: of tensors read twice, of second order, in forward mode."""

import gc
import threading

import pytest
import torch
from models import (
    FEATURES,
    Function,
    assert_close,
    assert_same,
    backward,
    choosing,
    masked_fusion,
    mlp,
    toy,
)
from stacks import CHANNELS, Pool, batch, masked_chain, masked_nested, parts
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parameters_to_vector

import dynmm_kernels
from dynmm_kernels import (
    Branch,
    ChainedFusion,
    NestedFusion,
    RoutedFusion,
    Shared,
    combine,
    gather,
    ops,
    route,
)
from dynmm_kernels.nn import SEAdd

SPLITS = [[0, 1, 1, 0], [1, 1, 1, 1]]
DEPTHS = [[0, 2, 1, 0], [2, 2, 2, 2], [0, 0, 0, 0]]

for_splits = pytest.mark.parametrize("split", SPLITS)


class Attend(nn.Module):
    """Reads one tensor as query, key and value."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.linear(query) * torch.tanh(key) + value


@for_splits
@pytest.mark.parametrize("gate_grad", ["straight_through", "selected", "none"])
@pytest.mark.parametrize(
    "inputs", [[0, 0, 0], lambda x: (x, x, x), ["query", "key", "value"]], ids=["0", "call", "keys"]
)
def test_a_tensor_that_a_branch_reads_twice(inputs, gate_grad, split, backend):
    modules = [Attend(), Attend()]
    gate = choosing(split, 2)
    gate.requires_grad_(gate_grad == "straight_through")
    branches = [Branch(module, inputs=inputs) for module in modules]
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
    keys = isinstance(inputs, list) and isinstance(inputs[0], str)

    def call(x):
        return fusion({"query": x, "key": x, "value": x} if keys else x)

    expected = masked_fusion(gate, [Function(lambda x, m=m: m(x, x, x)) for m in modules])
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    assert_same(backward(call, modules, [x]), backward(expected, modules, [x]))


@for_splits
def test_a_tensor_read_twice_stays_one_tensor(split):
    """So that attention sees self-attention, as it does when masked."""
    same = []
    one = Function(lambda q, k: same.append(q is k) or q)
    branches = [Branch(one, inputs=[0, 0]), Branch(one, inputs=[0, 0])]
    fusion = RoutedFusion(choosing(split, 2), branches, execution="routed")
    fusion(torch.randn(4, FEATURES, dtype=torch.float64))
    assert same
    assert all(same)


def test_gather_of_one_tensor_twice(backend):
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows = gather(route(torch.tensor([0, 1, 0]), 2), [x, {"again": x}])
    (grad,) = torch.autograd.grad(sum((a * b["again"]).sum() for a, b in rows), x)
    assert_close(grad, 2 * x)


def penalty_roads(call, x: Tensor, wanted: list[Tensor]) -> dict:
    """Every road to a second derivative, as functions of nothing."""

    def penalty():
        (grad,) = torch.autograd.grad(call(x).pow(2).sum(), x, create_graph=True)
        return grad.pow(2).sum()

    def by_backward(**options):
        for tensor in wanted:
            tensor.grad = None
        penalty().backward(**options)
        return [tensor.grad for tensor in wanted]

    return {
        "grad": lambda: torch.autograd.grad(penalty(), wanted),
        "backward": by_backward,
        "backward(inputs)": lambda: by_backward(inputs=wanted),
        "hvp": lambda: torch.autograd.functional.hvp(
            lambda y: call(y).pow(2).sum(), x.detach(), torch.ones_like(x)
        )[1:],
        "hessian": lambda: [
            torch.autograd.functional.hessian(lambda y: call(y).pow(2).sum(), x.detach())
        ],
    }


ROADS = ["grad", "backward", "backward(inputs)", "hvp", "hessian"]


@for_splits
@pytest.mark.parametrize("road", ROADS)
def test_a_second_derivative_through_straight_through_is_refused(road, split, backend):
    gate, branches = toy(2)
    gate[-1].bias.data = torch.tensor([0.0, 50.0 * (0 not in split)], dtype=torch.float64)
    fusion = RoutedFusion(gate, branches, execution="routed")
    x = torch.randn(4, FEATURES, dtype=torch.float64, requires_grad=True)
    roads = penalty_roads(fusion, x, [x, *fusion.parameters()])
    with pytest.raises(RuntimeError, match="second derivative through the gate's straight-through"):
        roads[road]()


@pytest.mark.parametrize("of", ["gate", "starved branch"])
def test_the_refusal_reaches_every_parameter(of):
    """Also the one nobody chose: masked execution has a second derivative there.

    That with respect to the branch that runs on all samples is known, and exact.
    """
    gate, branches = toy(2)
    gate[-1].bias.data = torch.tensor([50.0, 0.0], dtype=torch.float64)
    fusion = RoutedFusion(gate, branches, execution="routed")
    x = torch.randn(4, FEATURES, dtype=torch.float64, requires_grad=True)
    chosen, starved = (branch[0].weight for branch in branches)

    def second(call, wanted):
        (grad,) = torch.autograd.grad(call(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), wanted)

    assert_close(second(fusion, chosen), second(masked_fusion(gate, branches), chosen), 1e-9)
    with pytest.raises(RuntimeError, match="second derivative"):
        second(fusion, {"gate": gate[0].weight, "starved branch": starved}[of])
    (zero,) = torch.autograd.grad(fusion(x).pow(2).sum(), starved, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(zero.sum(), gate[0].weight)


def test_what_does_not_depend_on_the_gate_has_its_second_derivative():
    """A head behind the fusion: its own second derivative is exact and is not refused."""
    fusion = RoutedFusion(*toy(2), execution="routed")
    head = nn.Linear(3, 1, dtype=torch.float64)
    x = torch.randn(4, FEATURES, dtype=torch.float64, requires_grad=True)

    def second(call):
        loss = head(call(x)).pow(2).sum()
        (grad,) = torch.autograd.grad(loss, head.weight, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), head.weight)

    expected = masked_fusion(fusion.gate.module, [b.module for b in fusion.branches])
    assert_close(second(fusion), second(expected), 1e-10)


def selected_weights(probs: Tensor, choice: Tensor) -> Tensor:
    hard = torch.nn.functional.one_hot(choice, probs.shape[1]).to(probs.dtype)
    return torch.where(hard == 1, hard - probs.detach() + probs, 0)


@for_splits
@pytest.mark.parametrize("road", ROADS)
def test_second_derivatives_of_selected_are_exact(road, split, backend):
    gate, branches = toy(2)
    gate[-1].bias.data = torch.tensor([0.0, 50.0 * (0 not in split)], dtype=torch.float64)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad="selected")

    def masked(x):
        logits = gate(x)
        weights = selected_weights(logits.softmax(1), logits.argmax(1))
        return sum(weights[:, b : b + 1] * branch(x) for b, branch in enumerate(branches))

    x = torch.randn(4, FEATURES, dtype=torch.float64, requires_grad=True)
    wanted = [x, *fusion.parameters()]
    ours = penalty_roads(fusion, x, wanted)[road]()
    theirs = penalty_roads(masked, x, wanted)[road]()
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.any()]
    assert pairs
    for a, b in pairs:
        assert_close(a, b, 1e-9)


def test_second_derivatives_of_multi_hot_selected_are_exact(backend):
    gate, branches = toy(3)
    fusion = RoutedFusion(
        gate, branches, execution="routed", gate_grad="selected", select="multi_hot"
    )

    def masked(x):
        logits = gate(x)
        hard, probs = (logits > 0).to(logits.dtype), logits.sigmoid()
        weights = torch.where(hard == 1, hard - probs.detach() + probs, 0)
        return sum(weights[:, b : b + 1] * branch(x) for b, branch in enumerate(branches))

    x = torch.randn(9, FEATURES, dtype=torch.float64, requires_grad=True)
    wanted = [x, *fusion.parameters()]
    assert_close(
        penalty_roads(fusion, x, wanted)["grad"](), penalty_roads(masked, x, wanted)["grad"](), 1e-9
    )


def stack(kind: str, gate_grad: str, execution: str = "routed"):
    """A stack of two cells with its masked formula."""
    main, aux, fusions = parts("mlp", 2)
    if kind == "nested":
        gate = Pool(2 * CHANNELS, 3)
        fusion = NestedFusion(gate, main, aux, fusions, execution=execution, gate_grad=gate_grad)
        return fusion, masked_nested(gate, main, aux, fusions, mode=gate_grad)
    gates = [Pool(2 * CHANNELS, 2) for _ in range(2)]
    fusion = ChainedFusion(gates, main, aux, fusions, execution=execution, gate_grad=gate_grad)
    return fusion, masked_chain(gates, main, aux, fusions, mode=gate_grad)


def second_of(call, inputs, wanted):
    (grad,) = torch.autograd.grad(call(*inputs).pow(2).sum(), inputs[0], create_graph=True)
    return torch.autograd.grad(grad.pow(2).sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("kind", ["nested", "chained"])
@pytest.mark.parametrize("seed", range(4))
def test_second_derivatives_of_stacks(kind, seed):
    """Exact where only what ran teaches; refused with the exact gradient of the gate."""
    torch.manual_seed(seed)
    fusion, masked = stack(kind, "selected")
    inputs = [x.requires_grad_() for x in batch("mlp", 6)]
    wanted = [*inputs, *fusion.parameters()]
    ours, theirs = (second_of(call, inputs, wanted) for call in (fusion, masked))
    for a, b in zip(ours, theirs, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        assert_close(a.double() + 0 * b, b + 0 * a.double(), 1e-8)
    fusion.gate_grad = "straight_through"
    for tensor in inputs:
        with pytest.raises(RuntimeError, match="second derivative"):
            second_of(fusion, inputs, [tensor])


@pytest.mark.parametrize("kind", ["nested", "chained"])
@pytest.mark.parametrize("choice", [[1, 0, 1], [0, 0, 0]])
def test_the_refusal_reaches_an_auxiliary_stream_that_no_gate_reads(kind, choice):
    gate, stages = choosing(choice, 2), parts("mlp", 1)
    fusion = NestedFusion(gate, *stages) if kind == "nested" else ChainedFusion([gate], *stages)
    main, aux = batch("mlp", 3)
    aux.requires_grad_()
    (grad,) = torch.autograd.grad(fusion(main, aux).pow(2).sum(), gate.logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(grad.pow(2).sum(), aux)


@pytest.mark.parametrize("active", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_se_add_is_differentiated_to_any_order(active, layout, backend):
    fusion = SEAdd(4, reduction=2).double()
    main, aux = (torch.randn(n, 4, 2, 3, dtype=torch.float64) for n in (3, active))
    leaves = [x.to(memory_format=layout).requires_grad_() for x in (main, aux)]
    inputs = (*leaves, *fusion.parameters())
    assert torch.autograd.gradgradcheck(lambda m, a, *_: fusion(m, a), inputs)
    assert torch.autograd.gradcheck(fusion, leaves, check_forward_ad=True)


def test_se_add_with_dropout_has_no_second_derivative():
    fusion = SEAdd(16).double()
    fusion.excite_main.append(nn.Dropout(0.5))
    main, aux = (torch.randn(3, 16, 2, 2, dtype=torch.float64) for _ in range(2))
    out = fusion(main.requires_grad_(), aux)
    with pytest.raises(RuntimeError, match="otherwise than before"):
        torch.autograd.grad(out.pow(2).sum(), main, create_graph=True)


def test_se_add_keeps_nothing_alive():
    fusion = SEAdd(4)
    main, aux = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)

    def alive() -> int:
        gc.collect()
        return sum(type(x) is Tensor for x in gc.get_objects())

    fusion(main, aux).sum().backward()
    before = alive()
    for _ in range(20):
        fusion(main, aux).sum().backward()
        fusion(main, aux)
    assert alive() - before < 10


def tangent_of(call, inputs, tangents):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        return forward_ad.unpack_dual(call(*duals)).tangent


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("select", [1, 2, "multi_hot"])
@pytest.mark.parametrize("gate_grad", ["straight_through", "none"])
def test_forward_mode(gate_grad, select, trained, backend):
    """As masked execution has it, whether parameters require grad or not."""
    gate, branches = toy(3)
    fusion = RoutedFusion(
        gate, branches, execution="routed", gate_grad=gate_grad, select=select
    ).requires_grad_(trained)
    x, t = torch.randn(2, 7, FEATURES, dtype=torch.float64)
    ours = tangent_of(fusion, [x], [t])
    fusion.execution = "masked"
    assert_close(ours, tangent_of(fusion, [x], [t]), 1e-10)
    numeric = (fusion(x + 1e-6 * t) - fusion(x - 1e-6 * t)) / 2e-6
    if gate_grad == "none" and select != 2:
        assert_close(ours, numeric, 1e-6)


def test_forward_mode_against_the_formula(backend):
    gate, branches = toy(3)
    fusion = RoutedFusion(gate, branches, execution="routed")
    x, t = torch.randn(2, 7, FEATURES, dtype=torch.float64)
    expected = masked_fusion(gate, branches)
    assert_close(tangent_of(fusion, [x], [t]), tangent_of(expected, [x], [t]), 1e-10)
    ours, theirs = (torch.func.jvp(call, (x,), (t,))[1] for call in (fusion, expected))
    assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("kind", ["nested", "chained"])
@pytest.mark.parametrize("seed", range(4))
def test_forward_mode_of_stacks(kind, seed):
    torch.manual_seed(seed)
    fusion, masked = stack(kind, "straight_through")
    inputs, tangents = batch("mlp", 6), batch("mlp", 6)
    ours, theirs = (tangent_of(call, inputs, tangents) for call in (fusion, masked))
    assert_close(ours, theirs, 1e-10)


def test_forward_over_reverse_through_straight_through_is_refused():
    fusion = RoutedFusion(*toy(2), execution="routed")
    x, t = torch.randn(2, 5, FEATURES, dtype=torch.float64)

    def gradient(y):
        return torch.autograd.grad(fusion(y).pow(2).sum(), y)[0]

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="second derivative"):
        gradient(forward_ad.make_dual(x.requires_grad_(), t))


def test_parameters_of_a_starved_branch_get_writable_zeros():
    gate, branches = toy(2)
    fusion = RoutedFusion(gate, branches, execution="routed")
    x = torch.randn(3, FEATURES, dtype=torch.float64)
    grads = torch.autograd.grad(fusion(x, choice=0).sum(), [*branches[1].parameters()])
    for grad in grads:
        grad.mul_(2).add_(1)
    assert parameters_to_vector(grads).eq(1).all()


def test_shared_tensors_of_a_starved_branch_get_zeros():
    table = torch.randn(FEATURES, 3, dtype=torch.float64, requires_grad=True)
    branches = [Branch(mlp(3), inputs=[0]), Function(lambda x, t: x @ t)]
    fusion = RoutedFusion(choosing([0, 0], 2), branches, execution="routed")
    fusion(torch.randn(2, FEATURES, dtype=torch.float64), Shared(table), choice=0).sum().backward()
    assert table.grad is not None
    assert not table.grad.any()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_backward_runs_on_the_backend_of_its_forward(monkeypatch, elsewhere):
    """On a GPU autograd calls it from a thread of its own."""
    calls = []
    with dynmm_kernels.backend("reference"):
        kernels = ops.kernels()
        gather_rows = kernels.gather_rows
        monkeypatch.setattr(kernels, "gather_rows", lambda *a: calls.append(1) or gather_rows(*a))
        outputs = [torch.randn(n, 2, requires_grad=True) for n in (2, 1)]
        out = combine(route(torch.tensor([0, 1, 0]), 2), outputs)
    backward = out.sum().backward
    if elsewhere:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    else:
        backward()
    assert calls
    assert all(output.grad.eq(1).all() for output in outputs)
