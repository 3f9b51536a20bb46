"""Outputs stacked, concatenated or by name: w_b * E_b(x) + (1 - w_b) * fill, all gradients."""

import copy

import pytest
import torch
from compiling import Counted, Steered, assert_agree, splits
from models import FEATURES, FixedGate, Function, Planned, backward, choosing, hard_weights, mlp
from torch import Tensor, nn

from dynmm_kernels import Branch, RoutedFusion
from dynmm_kernels.functional.filled import LEAST

N, BRANCHES = 7, 3
CHOICES = {
    "mixed": [0, 2, 1, 0, 1, 2, 2],
    "starved": [0, 2, 2, 0, 0, 2, 0],
    "single": [0, 2, 2, 1, 0, 2, 0],
    "one": [2] * N,
}
WIDTHS = {"sum": (3, 3, 3), "stack": (3, 3, 3), "concat": (2, 3, 4), "dict": (2, 3, 4)}
KINDS = ["stack", "concat", "dict"]
EXECUTIONS = ["routed", "masked", "auto"]  # auto is made to select, masked

for_kinds = pytest.mark.parametrize("kind", KINDS)
for_fills = pytest.mark.parametrize("fill", [0.0, -1.5])


class Two(nn.Module):
    """A pytree with a vector of its own where the branches may differ."""

    def __init__(self, kind: str, index: int):
        super().__init__()
        self.own, self.kind, self.index = mlp(WIDTHS[kind][index]), kind, index

    def forward(self, x: Tensor):
        y = self.own(x)
        if self.kind == "dict" and self.index == 1:
            return y
        second = y.exp().unsqueeze(2).expand(-1, -1, 2)
        return {"y": y, "z": [second]}


def made(kind, gate=None, **settings):
    torch.manual_seed(0)
    branches = {name: Two(kind, i) for i, name in enumerate("abc")}
    fusion = RoutedFusion(gate or mlp(BRANCHES), branches, outputs=kind, **settings)
    fusion.chooser.forced = "masked", False
    return fusion


def leaves_of(output):
    return [output] if isinstance(output, Tensor) else [output["y"], output["z"][0]]


def by_definition(fusion, weights_of):
    """Every branch on every sample, in the words of the docstring."""

    def fuse(x):
        weights, fill, apart = weights_of(x), fusion.fill, []
        for b, branch in enumerate(fusion.branches):
            leaves = []
            for leaf in leaves_of(branch.module(x)):
                w = weights[:, b].reshape(-1, *[1] * (leaf.ndim - 1))
                leaves.append(w * leaf + (1 - w) * fill)
            apart.append(leaves)
        if fusion.outputs == "dict":
            return {
                name: leaves[0] if len(leaves) == 1 else {"y": leaves[0], "z": [leaves[1]]}
                for name, leaves in zip("abc", apart, strict=True)
            }
        join = torch.stack if fusion.outputs == "stack" else torch.cat
        first, second = (join(list(column), dim=1) for column in zip(*apart, strict=True))
        return {"y": first, "z": [second]}

    return fuse


def learned(weights: Tensor, chosen: Tensor, gate_grad: str) -> Tensor:
    if gate_grad == "none":
        return weights.detach()
    return weights if gate_grad == "straight_through" else torch.where(chosen, weights, 0)


def check(fusion, weights_of, *inputs, tolerance=1e-12, **options):
    """Values in eval without a graph, and values with every gradient."""
    fuse = by_definition(fusion, weights_of)
    x = torch.randn(N, FEATURES, dtype=torch.float64)
    call = lambda x: fusion(x, *inputs, **options)  # noqa: E731
    mine, wanted = (backward(f, [fusion], (x,)) for f in (call, fuse))
    assert_agree(mine, wanted, tolerance)
    assert type(mine.output) is type(wanted.output)
    with torch.no_grad():
        fusion.eval()
        torch.testing.assert_close(call(x), fuse(x), rtol=tolerance, atol=tolerance)


@for_kinds
@for_fills
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("gate_grad", ["straight_through", "selected", "none"])
@pytest.mark.parametrize(
    "settings", [*({"execution": way} for way in EXECUTIONS), {"starved": "run"}], ids=str
)
def test_one_branch_per_sample(kind, fill, choice, gate_grad, settings):
    gate = choosing(choice, BRANCHES)
    fusion = made(kind, gate, fill=fill, gate_grad=gate_grad, **settings)
    chosen = torch.tensor(choice)[:, None] == torch.arange(BRANCHES)
    check(fusion, lambda x: learned(hard_weights(gate.logits), chosen, gate_grad))


@for_kinds
@for_fills
@pytest.mark.parametrize("execution", [*EXECUTIONS, "dense"])
@pytest.mark.parametrize("select", [2, "multi_hot"])
def test_several_branches_per_sample(kind, fill, execution, select):
    logits = torch.randn(N, BRANCHES, dtype=torch.float64) - 0.2
    logits[:, 1] -= 5  # starved
    gate = FixedGate(logits)
    fusion = made(kind, gate, fill=fill, execution=execution, select=select)

    def weights(x):
        real = gate.logits
        if select == 2:
            if execution == "dense":
                return real.softmax(1)
            places = real.argsort(1, descending=True)[:, :2]
            return torch.zeros_like(real).scatter(1, places, real.gather(1, places).softmax(1))
        probs = real.sigmoid()
        return probs if execution == "dense" else (real > 0).double() + probs - probs.detach()

    check(fusion, weights)


@for_kinds
@for_fills
@pytest.mark.parametrize("execution", [*EXECUTIONS, "dense"])
@pytest.mark.parametrize("choice", ["mask", "nobody", "some", "uniform", 1])
def test_forced(kind, fill, execution, choice):
    forced = {
        "mask": torch.rand(N, BRANCHES) < torch.tensor([0.5, 0.0, 0.7]),
        "nobody": torch.full((N,), -1),
        "some": torch.tensor([0, -1, 2, 0, 2, -1, 0]),
    }.get(choice, choice)
    weights = torch.full((N, BRANCHES), 1 / BRANCHES, dtype=torch.float64)
    if choice == "mask":
        weights = forced.double()
    elif choice != "uniform":
        own = torch.full((N,), 1) if choice == 1 else forced
        weights = (own[:, None] == torch.arange(BRANCHES)).double()
    check(made(kind, fill=fill, execution=execution), lambda x: weights, choice=forced)


@for_kinds
def test_uniform_is_as_precise_as_the_outputs(kind):
    branches = [Function(lambda x, b=b: x.double() + b) for b in range(BRANCHES)]
    x = torch.randn(N, 1)
    out = RoutedFusion(mlp(3), branches, outputs=kind, fill=1.0)(x, choice="uniform")
    parts = out.values() if kind == "dict" else out.unbind(1)
    for b, part in enumerate(parts):
        wanted = (x.double()[:, 0] + b) / 3 + (1 - 1 / 3)
        torch.testing.assert_close(part.view(N), wanted, rtol=1e-15, atol=1e-15)


@for_kinds
@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_integers_and_bools(kind, execution):
    branches = [
        Function(lambda x, b=b: (x.round().long() + b, x > b, x[:, :1])) for b in range(BRANCHES)
    ]
    x = torch.randn(N, FEATURES, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]] + [[0, 1, 0]] * 4).bool()
    fusion = RoutedFusion(
        nn.Identity(), branches, outputs=kind, execution=execution, select="multi_hot", fill=1
    )
    got = fusion(x, choice=mask)
    wanted = []
    for b in range(BRANCHES):
        here = mask[:, b : b + 1]
        y = torch.where(here, x.round().long() + b, 1), torch.where(here, x > b, True)
        wanted.append((*y, torch.where(here, x[:, :1], 1.0)))
    if kind == "dict":
        torch.testing.assert_close(got, {str(b): part for b, part in enumerate(wanted)})
    else:
        join = torch.stack if kind == "stack" else torch.cat
        torch.testing.assert_close(got, tuple(join(c, 1) for c in zip(*wanted, strict=True)))
    fusion.fill = 0.5
    with pytest.raises(TypeError, match=r"torch\.int64 cannot be filled with 0\.5"):
        fusion(x, choice=mask)


@for_kinds
def test_second_derivatives_are_exact_or_refused(kind):
    """Of a branch that all samples take they need nothing of the others."""
    found, gate = [], Planned(mlp(3), torch.tensor(CHOICES["one"]), 3)
    for execution in ("routed", "masked"):
        fusion = made(kind, gate, execution=execution)
        x = torch.randn(
            N, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        out = fusion(x.requires_grad_())
        leaf = out["c"]["y"] if kind == "dict" else out["y"]
        (slope,) = torch.autograd.grad(leaf.sin().sum(), x, create_graph=True)
        if kind != "dict" and execution == "routed":
            with pytest.raises(RuntimeError, match="second derivative"):
                torch.autograd.grad(slope.square().sum(), x)
            return
        found += torch.autograd.grad(slope.square().sum(), x)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"gate_grad": "selected"}, {"select": 2}], ids=str)
def test_by_name_every_part_has_the_graph_of_its_own_branch_and_of_the_weights(settings):
    logits = torch.zeros(N, BRANCHES, dtype=torch.float64)
    logits[:, 0] -= 9
    gate = FixedGate(logits + torch.arange(BRANCHES))
    fusion = made("dict", gate, execution="routed", **settings)
    fusion.branches[0].requires_grad_(False)
    out = fusion(torch.randn(N, FEATURES, dtype=torch.float64))
    out["a"]["y"].sum().backward()  # nobody chose it
    assert gate.logits.grad is not None
    assert not gate.logits.grad.any()
    assert all(p.grad is None for p in fusion.branches.parameters())


@for_kinds
@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_auxiliary_losses(kind, execution):
    """Summed over who was chosen; by name each its own."""
    branches = [Function(lambda x, b=b: (x * b, x.new_tensor(10.0**b))) for b in range(BRANCHES)]
    fusion = RoutedFusion(choosing(CHOICES["starved"], 3), branches, outputs=kind)
    fusion.execution = execution
    x = torch.randn(N, FEATURES, dtype=torch.float64)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            out = fusion.train(training)(x)
        if kind == "dict":
            assert [out[str(b)][1].item() for b in range(3)] == [1, 0, 100]
        else:
            assert out[1].item() == 101


@for_kinds
def test_what_a_branch_that_was_not_chosen_says_does_not_show(kind):
    branches = [nn.Identity(), Function(lambda x: x / 0)]
    x = torch.randn(N, FEATURES, dtype=torch.float64)
    for settings in ({"execution": "routed"}, {"execution": "auto"}, {"starved": "run"}):
        for split in ([0] * N, [0, 1, 0, 0, 0, 0, 0]):
            gate = choosing(split, 2)
            fusion = RoutedFusion(gate, branches, outputs=kind, **settings)
            for training in (True, False) * 4:
                with torch.set_grad_enabled(training):
                    out = fusion.train(training)(x)
                parts = list(out.values()) if kind == "dict" else out
                parts = {"stack": lambda p: p.unbind(1), "concat": lambda p: p.split(6, 1)}.get(
                    kind, lambda p: p
                )(parts)
                here = torch.tensor(split)[:, None]
                torch.testing.assert_close(parts[0], torch.where(here == 0, x, 0))
                torch.testing.assert_close(parts[1], torch.where(here == 1, x / 0, 0))


@pytest.mark.parametrize("kind", ["concat", "dict"])
@pytest.mark.parametrize("batch_norm", ["masked", "subset"])
@pytest.mark.parametrize("training", [True, False])
def test_a_starved_branch_is_asked_for_its_shape_alone(kind, batch_norm, training):
    """Without a graph, without statistics, and counted where it says what ran."""
    calls = []
    branches = {
        name: nn.Sequential(mlp(width), nn.BatchNorm1d(width, dtype=torch.float64))
        for name, width in (("a", 2), ("b", 5))
    }
    branches["b"].register_forward_hook(lambda module, given, out: calls.append(out))
    fusion = RoutedFusion(mlp(2), branches, outputs=kind, batch_norm=batch_norm, fill=2.0)
    fusion.train(training)
    before = copy.deepcopy(branches["b"][1].state_dict())
    x = torch.randn(N, FEATURES, dtype=torch.float64)
    out, routing = fusion(x, choice=0, return_routing=True)
    b = out["b"] if kind == "dict" else out[:, 2:]
    assert torch.equal(b, torch.full((N, 5), 2.0, dtype=torch.float64))
    whole = training and batch_norm == "masked"
    assert len(calls) == 1
    assert len(calls[0]) == routing.rows_run[1] == (N if whole else LEAST)
    assert calls[0].requires_grad == whole
    if not whole:
        torch.testing.assert_close(branches["b"][1].state_dict(), before)
    b.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in branches["b"].parameters())


def test_stacked_a_starved_branch_is_not_called():
    branches = [mlp(), Function(lambda x: 1 / 0)]
    out = RoutedFusion(mlp(2), branches, outputs="stack", fill=3.0)(
        torch.randn(N, FEATURES, dtype=torch.float64), choice=0
    )
    assert torch.equal(out[:, 1], torch.full((N, 3), 3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "second", "said"),
    [
        ("stack", lambda x: x[:, 1:], r"branch '1': output 0 has rows of shape \[5\], those of"),
        ("stack", lambda x: (x, x), "branch '1' returns another structure than branch '0'"),
        ("concat", lambda x: x[:, 0], r"branch '1': output 0 must have a dimension 1 to conc"),
        ("concat", lambda x: x[:, :, None], r"must be equal, but for dimension 1"),
        ("concat", lambda x: {"a": x}, "branch '1' returns another structure than branch '0'"),
        ("dict", lambda x: x[1:], r"branch '1': output 0 must have \d rows"),
    ],
)
@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_what_does_not_fit_is_named(kind, second, said, execution):
    branches = [nn.Identity(), Function(second)]
    fusion = RoutedFusion(choosing([0, 1] * 3, 2), branches, outputs=kind, execution=execution)
    with pytest.raises(ValueError, match=said):
        fusion(torch.randn(6, FEATURES, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("outputs", "list", r"outputs must be one of 'sum', 'stack', 'concat', 'dict'; got 'list'"),
        ("fill", float("nan"), "fill must be a finite number; got nan"),
        ("fill", "0", "fill must be a finite number; got '0'"),
        ("fill", True, "fill must be a finite number; got True"),
    ],
)
def test_bad_settings(name, value, said):
    with pytest.raises(ValueError, match=said):
        RoutedFusion(mlp(2), [mlp(), mlp()], **{name: value})


@for_kinds
@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("learns", [True, False])
def test_autocast(kind, execution, learns):
    """Dtypes as where they are summed; by name each branch's own."""

    class Float(nn.Linear):
        def forward(self, x):
            return super().forward(x).float()

    fusion = RoutedFusion(
        nn.Linear(4, 2), [nn.Linear(4, 3), Float(4, 3)], outputs=kind, execution=execution, fill=0.5
    )
    x = torch.randn(6, 4)
    with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16):
        choice = None if learns else torch.tensor([0, 1] * 3)
        out = fusion(x, choice=choice)
    if kind == "dict":
        assert [part.dtype for part in out.values()] == [torch.bfloat16, torch.float32]
    else:
        assert out.dtype == torch.float32


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize(
    ("kind", "fill", "gate_grad"),
    [
        ("stack", -1.5, "straight_through"),
        ("concat", 0.0, "selected"),
        ("dict", -1.5, "none"),
        ("dict", 0.0, "straight_through"),
    ],
)
def test_compiled(kind, fill, gate_grad):
    """One graph for every split."""
    branches = {name: Branch(Two(kind, i), inputs=[0]) for i, name in enumerate("abc")}
    fusion = RoutedFusion(Steered(), branches, outputs=kind, fill=fill, gate_grad=gate_grad)
    masked = copy.deepcopy(fusion)
    masked.execution = "masked"
    compiled = Counted(fusion)
    for steer in splits(6):
        x = torch.randn(len(steer), FEATURES, dtype=torch.float64)
        mine = backward(compiled, [fusion], (x, steer))
        assert_agree(mine, backward(masked, [masked], (x, steer)), 1e-9)
    assert compiled.graphs == 1


@for_kinds
def test_empty_batches(kind):
    out = made(kind)(torch.randn(0, FEATURES, dtype=torch.float64), choice=0)
    shapes = {"stack": [0, 3, 3], "concat": [0, 9], "dict": [0, 3]}
    leaf = out["b"] if kind == "dict" else out["y"]
    assert list(leaf.shape) == shapes[kind]
