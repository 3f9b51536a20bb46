"""torch.func over modules and the functional floor: right, or refused in words."""

import pytest
import torch
from models import FEATURES, assert_close, toy
from stacks import CHANNELS, Pool, batch, parts
from torch import func, nn

from dynmm_kernels import (
    CascadeFusion,
    ChainedFusion,
    EnergyFusion,
    NestedFusion,
    RoutedFusion,
    combine,
    gather,
    route,
)

KINDS = ["routed", "run", "nested", "chained"]
CASCADES = ["cascade", "cascade in step"]
GATE_GRADS = ["straight_through", "selected", "none"]

for_kinds = pytest.mark.parametrize("kind", KINDS)
for_gradients = pytest.mark.parametrize("gate_grad", GATE_GRADS)


class Partly(nn.Module):
    """Energy fusion of what is positive."""

    def __init__(self):
        super().__init__()
        self.fusion = EnergyFusion(toy(2)[1])

    def forward(self, x, y):
        return self.fusion(x, y, present=torch.stack([x[:, 0] > 0, y[:, 0] > 0], 1))


def problem(kind: str, gate_grad: str = "straight_through", execution: str = "routed"):
    """A fusion and its inputs; the same for every execution."""
    torch.manual_seed(3)
    settings = {"gate_grad": gate_grad, "execution": execution}
    if kind in ("routed", "run"):
        settings["starved"] = "run" if kind == "run" else "skip"
        return RoutedFusion(*toy(3), **settings), (torch.randn(5, FEATURES).double(),)
    if kind in CASCADES:
        settings = {"execution": execution, "starved": "run" if "step" in kind else "skip"}
        cascade = CascadeFusion(toy(3)[1], threshold=0.5, fuse="mean", **settings)
        return cascade.eval(), (3 * torch.randn(7, FEATURES).double(),)
    if kind in ("energy", "partly"):
        fusion = EnergyFusion(toy(2)[1]) if kind == "energy" else Partly()
        return fusion, (torch.randn(5, FEATURES).double(), torch.randn(5, FEATURES).double())
    if kind == "nested":
        return NestedFusion(Pool(2 * CHANNELS, 3), *parts("mlp", 2), **settings), batch("mlp", 5)
    gates = [Pool(2 * CHANNELS, 2) for _ in range(2)]
    return ChainedFusion(gates, *parts("mlp", 2), **settings), batch("mlp", 5)


def parameters(fusion: nn.Module) -> dict:
    return {name: p.detach() for name, p in fusion.named_parameters()}


def loss(fusion, inputs):
    return lambda p: func.functional_call(fusion, p, inputs).pow(2).sum()


def gradients(fusion, inputs):
    return [*func.grad(loss(fusion, inputs))(parameters(fusion)).values()]


def vector_jacobian(fusion, inputs):
    output, backward = func.vjp(lambda *x: fusion(*x), *inputs)
    return [output, *backward(torch.ones_like(output))]


def jacobian_vector(fusion, inputs):
    return [*func.jvp(lambda *x: fusion(*x), inputs, tuple(map(torch.ones_like, inputs)))]


def jacobian_vector_of_parameters(fusion, inputs):
    given = parameters(fusion)
    along = {name: torch.ones_like(p) for name, p in given.items()}
    return [func.jvp(loss(fusion, inputs), (given,), (along,))[1]]


def backward_jacobian(fusion, inputs):
    return [func.jacrev(lambda x: fusion(x, *inputs[1:]))(inputs[0])]


def forward_jacobian(fusion, inputs):
    return [func.jacfwd(lambda x: fusion(x, *inputs[1:]))(inputs[0])]


def autograd_jacobian(fusion, inputs):
    return [*torch.autograd.functional.jacobian(lambda *x: fusion(*x), inputs)]


RIGHT = [
    gradients,
    vector_jacobian,
    jacobian_vector,
    jacobian_vector_of_parameters,
    backward_jacobian,
    forward_jacobian,
    autograd_jacobian,
]


@pytest.mark.parametrize("transform", RIGHT)
@for_gradients
@for_kinds
def test_as_masked(kind, gate_grad, transform):
    ours = transform(*problem(kind, gate_grad))
    assert_close(ours, transform(*problem(kind, gate_grad, "masked")), 1e-9)


@pytest.mark.parametrize("transform", RIGHT)
@pytest.mark.parametrize("kind", CASCADES)
def test_cascades_as_masked(kind, transform):
    assert len({*problem(kind)[0](*problem(kind)[1], return_routing=True)[1].rows_run}) == 3
    expected = transform(*problem(kind, execution="masked"))
    assert_close(transform(*problem(kind)), expected, 1e-9)


@pytest.mark.parametrize("kind", ["routed", "run"])
def test_second_derivatives_of_selected(kind):
    def hessian(fusion, inputs):
        return func.hessian(lambda x: fusion(x).pow(2).sum())(*inputs)

    expected = hessian(*problem(kind, "none", "masked"))
    assert_close(hessian(*problem(kind, "none")), expected, 1e-9)
    with pytest.raises(RuntimeError, match="second derivative"):
        hessian(*problem(kind, "straight_through"))


def over_samples(fusion, inputs):
    """Two batches at once."""
    batches = [torch.stack([x, 2 * x]) for x in inputs]
    return func.vmap(lambda *x: fusion(*x))(*batches)


def over_models(fusion, inputs):
    stacked = {name: torch.stack([p, 1.1 * p]) for name, p in parameters(fusion).items()}
    return func.vmap(lambda p: func.functional_call(fusion, p, inputs))(stacked)


def per_sample_gradients(fusion, inputs):
    def of_one(p, *sample):
        return loss(fusion, tuple(x.unsqueeze(0) for x in sample))(p)

    dims = (None, *[0] * len(inputs))
    return [*func.vmap(func.grad(of_one), dims)(parameters(fusion), *inputs).values()]


def expected_of(mapped, kind, execution):
    fusion, inputs = problem(kind, execution=execution)
    if mapped is over_samples:
        return torch.stack([fusion(*inputs), fusion(*(2 * x for x in inputs))]).detach()
    given = parameters(fusion)
    if mapped is over_models:
        bigger = {name: 1.1 * p for name, p in given.items()}
        both = [func.functional_call(fusion, p, inputs) for p in (given, bigger)]
        return torch.stack(both).detach()
    each = [
        func.grad(loss(fusion, tuple(x[n : n + 1] for x in inputs)))(given).values()
        for n in range(len(inputs[0]))
    ]
    return [torch.stack(column) for column in zip(*each, strict=True)]


@pytest.mark.parametrize("mapped", [over_samples, over_models, per_sample_gradients])
@pytest.mark.parametrize("execution", ["masked", "auto"])
@pytest.mark.parametrize("kind", [*KINDS, "cascade"])
def test_masked_is_mapped_over(kind, execution, mapped):
    ours = mapped(*problem(kind, execution=execution))
    assert_close(ours, expected_of(mapped, kind, "masked"), 1e-9)


@pytest.mark.parametrize("mapped", [over_samples, over_models, per_sample_gradients])
@pytest.mark.parametrize("kind", ["energy", "partly"])
def test_energy_fusion_is_mapped_over(kind, mapped):
    assert_close(mapped(*problem(kind)), expected_of(mapped, kind, "routed"), 1e-9)


@pytest.mark.parametrize("mapped", [over_samples, over_models, per_sample_gradients])
@pytest.mark.parametrize("kind", KINDS + CASCADES)
def test_routed_is_not_and_says_what_to_do(kind, mapped):
    with pytest.raises((ValueError, RuntimeError), match=r"vmap.*execution='masked'"):
        mapped(*problem(kind))


def test_the_functional_floor():
    plan = route(torch.tensor([1, 0, 1, 1]), 2)
    x, t = torch.randn(2, 4, 3, dtype=torch.float64)
    weights = torch.rand(4, dtype=torch.float64)

    def call(x, w):
        low, high = gather(plan, x)
        return combine(plan, [low.sin(), high.cos()], w)

    def plain(x, w):
        chosen = torch.tensor([[1.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
        return w[:, None] * (chosen * x.cos() + (1 - chosen) * x.sin())

    for of in (call, plain):
        assert of(x, weights).shape == (4, 3)
    pair = [
        [
            func.jvp(of, (x, weights), (t, weights))[1],
            func.grad(lambda x, w, of=of: of(x, w).pow(2).sum(), (0, 1))(x, weights),
            func.jacrev(of, (0, 1))(x, weights),
            func.jacfwd(of, (0, 1))(x, weights),
            func.hessian(lambda x, w, of=of: of(x, w).pow(2).sum(), (0, 1))(x, weights),
            func.vmap(of, (0, None))(torch.stack([x, t]), weights),
        ]
        for of in (call, plain)
    ]
    assert_close(*pair, 1e-10)
    with pytest.raises(RuntimeError, match="vmap over route is not offered"):
        func.vmap(lambda c: gather(route(c, 2), x)[0])(torch.tensor([[0, 1, 0, 1]] * 2))
