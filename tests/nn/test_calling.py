"""Functions and methods in the place of modules, and arguments passed by keyword."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from dynmm_kernels import (
    Branch,
    CascadeFusion,
    ChainedFusion,
    EnergyFusion,
    NestedFusion,
    RoutedFusion,
    Shared,
)
from dynmm_kernels.nn import EarlyExit, SkipLayer

N, CHOICE = 7, torch.tensor([0, 1, 1, 0, -1, 1, 0])
EXECUTIONS = ("routed", "masked", "auto")


class Net(nn.Module):
    """A network whose paths are methods."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def cheap(self, x, scale=1.0):
        return self.stem(x)[:, :3] * scale

    def costly(self, x, scale=1.0):
        return self.head(self.stem(x).tanh()) * scale


class Encoder(nn.Module):
    """As the models of Hugging Face are called: everything by keyword."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, 3)

    def forward(self, *, ids, mask=None, table=None, scale=1.0):
        x = self.linear(ids) * scale
        x = x if mask is None else x * mask
        return x if table is None else x + table


def two(net):
    return [net.cheap, functools.partial(net.costly, scale=2.0)]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_methods_and_partials_are_branches_with_the_gradients_of_masked(execution):
    torch.manual_seed(0)
    net, gate = Net().double(), nn.Linear(4, 2).double()
    fusion = RoutedFusion(gate, two(net), execution=execution)
    x = torch.randn(N, 4, dtype=torch.float64, requires_grad=True)
    weights = gate(x).softmax(1)
    hard = nn.functional.one_hot(weights.argmax(1), 2) - weights.detach() + weights
    wanted = hard[:, :1] * net.cheap(x) + hard[:, 1:] * net.costly(x, scale=2.0)
    tensors = [x, *gate.parameters(), *net.parameters()]
    grads = torch.autograd.grad(wanted.square().sum(), tensors)
    output = fusion(x)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(output.square().sum(), tensors)
    torch.testing.assert_close(got, grads, rtol=1e-10, atol=1e-12)


def test_the_parameters_of_a_methods_module_get_zeros_where_nobody_chose_it():
    net = Net()
    fusion = RoutedFusion(nn.Linear(4, 2), [net.cheap, nn.Linear(4, 3)], execution="routed")
    fusion(torch.randn(N, 4), choice=1).sum().backward()
    assert net.stem.weight.grad.count_nonzero() == 0


def test_a_method_follows_its_module_into_copies_and_pickles():
    fusion = RoutedFusion(nn.Linear(4, 2), two(Net())).eval()
    x = torch.randn(N, 4)
    for twin in (copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        torch.testing.assert_close(twin(x), fusion(x), rtol=0, atol=0)
        with torch.no_grad():
            for parameter in twin.branches.parameters():
                parameter.zero_()
        assert twin(x).count_nonzero() == 0
        assert fusion(x).count_nonzero() > 0


def test_a_batch_norm_behind_a_method_is_seen():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def features(self, x):
            return self.norm(x)

    fusion = RoutedFusion(nn.Linear(4, 2), [Normed().features, nn.Identity()])
    assert fusion.branches[0].couples_samples()


class Model(nn.Module):
    """It holds a fusion of its own methods."""

    def __init__(self):
        super().__init__()
        self.fusion = RoutedFusion(self.ask, [self.cheap, self.costly], execution="routed")
        self.gate, self.stem, self.head = nn.Linear(4, 2), nn.Linear(4, 3), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)

    def ask(self, x):
        return self.gate(x)

    def cheap(self, x):
        return self.stem(x)

    def costly(self, x):
        return self.norm(self.head(x))

    def forward(self, x):
        return self.fusion(x)

    def written_out(self, x):
        logits = self.gate(x)
        soft = logits.softmax(1)
        hard = nn.functional.one_hot(logits.argmax(1), 2).to(soft.dtype)
        weights = hard + soft - soft.detach()
        return weights[:, :1] * self.cheap(x) + weights[:, 1:] * self.costly(x)


def test_a_model_may_route_among_its_own_methods():
    torch.manual_seed(0)
    model, x = Model().double().eval(), torch.randn(16, 4, dtype=torch.float64)
    assert not model.fusion.training
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(x), model.written_out(x))
    grads = torch.autograd.grad(model(x).square().sum(), model.parameters())
    wanted = torch.autograd.grad(model.written_out(x).square().sum(), model.parameters())
    torch.testing.assert_close(grads, wanted)


def test_what_a_model_holds_is_in_it_once():
    model = Model()
    plain = {name for name in model.state_dict() if "." in name}
    assert {name.split(".")[0] for name in plain} == {"gate", "stem", "head", "norm"}
    assert len([*model.parameters()]) == len([*model.fusion.parameters()]) == 8
    model.load_state_dict(Model().state_dict())
    torch.func.functional_call(model, dict(model.named_parameters()), torch.randn(4, 4))
    assert repr(model).count("BatchNorm1d") == 1
    calls = []
    model.apply(calls.append)
    assert len({*map(id, calls)}) == len(calls)
    assert model.train().fusion.branches[1].couples_samples()


def test_a_method_keeps_its_module_where_nobody_else_holds_it():
    net = Net()
    fusion = RoutedFusion(nn.Linear(4, 2), two(net)).double()
    assert net.stem.weight.dtype == torch.float64
    assert sum(name.endswith("stem.weight") for name in fusion.state_dict()) == 2
    assert not fusion.eval().branches[0].module.owner.training


def test_functions_are_gates_stages_fusions_and_fuses():
    x, y = torch.randn(N, 4), torch.randn(N, 4)

    def gate(m, a):
        return torch.stack([m[:, 0], a[:, 0], m[:, 1]], 1)

    stages = [torch.tanh, torch.sigmoid]
    nested = NestedFusion(gate, stages, [torch.sin, torch.cos], [torch.add, torch.mul])
    reference = NestedFusion(gate, stages, [torch.sin, torch.cos], [torch.add, torch.mul])
    reference.execution = "masked"
    torch.testing.assert_close(nested(x, y), reference(x, y))
    chained = ChainedFusion(
        [lambda m, a: torch.stack([m[:, 0], a[:, 0]], 1), None],
        stages,
        [torch.sin, torch.cos],
        [torch.add, torch.mul],
    )
    assert chained(x, y).shape == (N, 4)
    cascade = CascadeFusion([torch.tanh, torch.sin], threshold=0.5, fuse=lambda logits: logits[-1])
    assert cascade.eval()(x).shape == (N, 4)
    energy = EnergyFusion([torch.tanh, torch.sin], weights="uniform")
    torch.testing.assert_close(energy(x, y), (x.tanh() + y.sin()) / 2)


@pytest.mark.parametrize(
    ("make", "role"),
    [
        (lambda bad: RoutedFusion(bad, [nn.Identity()]), "the gate"),
        (lambda bad: RoutedFusion(nn.Identity(), {"text": bad}), "branch 'text'"),
        (lambda bad: NestedFusion(nn.Identity(), [bad], [torch.sin], [torch.add]), "main stage 1"),
        (lambda bad: NestedFusion(nn.Identity(), [torch.sin], [bad], [torch.add]), "aux stage 1"),
        (lambda bad: NestedFusion(nn.Identity(), [torch.sin], [torch.sin], [bad]), "fusion 1"),
        (
            lambda bad: ChainedFusion([bad], [torch.sin], [torch.sin], [torch.add]),
            "gate 1",
        ),
        (lambda bad: EnergyFusion({"text": bad}), "encoder 'text'"),
        (lambda bad: CascadeFusion({"text": bad, "image": torch.sin}), "stage 'text'"),
        (lambda bad: SkipLayer(bad), "the layer"),
        (lambda bad: SkipLayer(torch.sin, bad), "the gate"),
        (lambda bad: EarlyExit(bad, [torch.sin]), "the gate"),
        (lambda bad: EarlyExit(torch.sin, [bad]), "layer 1"),
        (lambda bad: EarlyExit(torch.sin, [torch.sin], [torch.sin, bad]), "head 1"),
        (lambda bad: Branch(bad), "Branch: module"),
    ],
)
def test_what_cannot_be_called_is_named_by_its_role(make, role):
    with pytest.raises(TypeError, match=f"^{role} must be a module or a function; got int$"):
        make(3)
    with pytest.raises(TypeError, match=f"^{role} must .* got the class Linear: give an instance"):
        make(nn.Linear)


def named_inputs(dtype=torch.float64):
    ids = torch.randn(N, 4, dtype=dtype, requires_grad=True)
    mask = (torch.rand(N, 3) > 0.5).to(dtype)
    return {"ids": ids, "mask": mask, "table": Shared(torch.randn(3, dtype=dtype)), "scale": 3.0}


@pytest.mark.parametrize(
    ("execution", "gate_grad"),
    [
        *((execution, "straight_through") for execution in EXECUTIONS),
        ("routed", "selected"),
        ("routed", "none"),
    ],
)
def test_keywords_go_to_the_gate_and_the_branches_by_rows(execution, gate_grad):
    torch.manual_seed(1)

    class Gate(Encoder):
        def forward(self, *, ids, **others):
            return self.linear(ids)[:, :2]

    gate, branches = Gate().double(), [Encoder().double(), Encoder().double()]
    fusion = RoutedFusion(gate, branches, execution=execution, gate_grad=gate_grad)
    inputs = named_inputs()
    table = inputs["table"].tensor
    outputs = [branch(**{**inputs, "table": table}) for branch in branches]
    probs = gate(**inputs).softmax(1)
    hard = nn.functional.one_hot(probs.argmax(1), 2).double()
    weights = {
        "straight_through": hard - probs.detach() + probs,
        "selected": hard * (1 - probs.detach() + probs),
        "none": hard,
    }[gate_grad]
    wanted = sum(weights[:, b : b + 1] * outputs[b] for b in (0, 1))
    tensors = [inputs["ids"], *fusion.branches.parameters()]
    tensors += [] if gate_grad == "none" else [*gate.parameters()]
    grads = torch.autograd.grad(wanted.square().sum(), tensors)
    output = fusion(**inputs)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(output.square().sum(), tensors)
    torch.testing.assert_close(got, grads, rtol=1e-10, atol=1e-12)


def test_keywords_beside_positions_and_a_selection_of_both():
    seen = {}

    def both(x, *, mask):
        seen["both"] = (x.shape, mask.shape)
        return x * mask

    def one(mask):
        seen["one"] = mask.shape
        return mask * 2

    branches = {
        "both": both,
        "one": Branch(one, inputs=["mask"]),
        "first": Branch(torch.neg, inputs=0),
        "called": Branch(torch.add, inputs=lambda x, mask: (x, mask)),
        "renamed": Branch(lambda *, a, b: a - b, inputs={"b": "mask", "a": 0}),
    }
    fusion = RoutedFusion(lambda x, mask: x, branches, execution="routed").eval()
    x, mask, choice = torch.randn(5, 4), torch.randn(5, 4), torch.arange(5)
    output = fusion(x, mask=mask, choice=choice)
    wanted = [x * mask, mask * 2, -x, x + mask, x - mask]
    torch.testing.assert_close(output, torch.stack([y[i] for i, y in enumerate(wanted)]))
    assert seen == {"both": ((1, 4), (1, 4)), "one": (1, 4)}
    assert fusion.branches[0](x, mask=mask).shape == (5, 4)
    torch.testing.assert_close(fusion.branches[4](x, mask=mask), x - mask)


def test_one_dict_feeds_a_module_by_keyword():
    encoder, image = Encoder(), nn.Linear(5, 3)
    branches = {
        "text": Branch(encoder, inputs={"ids": "text", "mask": "text_mask"}),
        "image": Branch(image, inputs="image"),
    }
    fusion = RoutedFusion(Branch(nn.Linear(5, 2), inputs="image"), branches)
    inputs = {"text": torch.randn(N, 4), "text_mask": torch.ones(N, 3), "image": torch.randn(N, 5)}
    text, other = encoder(ids=inputs["text"], mask=inputs["text_mask"]), image(inputs["image"])
    wanted = text * (CHOICE == 0)[:, None] + other * (CHOICE == 1)[:, None]
    torch.testing.assert_close(fusion(inputs, choice=CHOICE), wanted)
    del inputs["text_mask"]
    with pytest.raises(ValueError, match="branch 'text' reads modality 'text_mask'; the inputs"):
        fusion(inputs, choice=CHOICE)


def test_hooks_of_a_branch_see_keywords():
    fusion = RoutedFusion(lambda *, ids: ids, {"text": Encoder()})
    seen = []
    fusion.branches[0].register_forward_pre_hook(
        lambda module, args, named: seen.append([*named]), with_kwargs=True
    )
    fusion(ids=torch.randn(N, 4), choice=torch.tensor([0, 0, -1, 0, 0, 0, 0]))
    assert seen == [["ids"]]


def test_encoders_and_stages_take_keywords():
    text, image = torch.randn(N, 3), torch.randn(N, 3)
    energy = EnergyFusion({"text": torch.neg, "image": torch.tanh}, weights="uniform")
    torch.testing.assert_close(energy(text=text, image=image), (image.tanh() - text) / 2)
    torch.testing.assert_close(energy(text=None, image=image), image.tanh())
    cascade = CascadeFusion([Encoder(), Encoder()], fuse="last").eval()
    ids = torch.randn(N, 4)
    torch.testing.assert_close(cascade(ids=ids, exit=1), cascade.stages[1].module(ids=ids))


def test_layers_are_functions_and_take_keywords_by_rows():
    x, mask = torch.randn(N, 4), (torch.rand(N, 4) > 0.5).float()

    def masked(x, *, mask, scale):
        return scale * x * mask

    keep = torch.tensor([True, False, True, True, False, False, True])
    y = SkipLayer(masked)(x, mask=mask, scale=2.0, keep=keep)
    torch.testing.assert_close(y, torch.where(keep[:, None], 2 * x * mask, x))
    depth = torch.tensor([0, 2, 1, 0, 2, 1, 0])
    exits = EarlyExit(lambda x, **_: x[:, :3], [masked, masked], heads=torch.neg)
    y = exits(x, mask=mask, scale=2.0, depth=depth)
    wanted = torch.stack([x, 2 * x * mask, 4 * x * mask])[depth, torch.arange(N)]
    torch.testing.assert_close(y, -wanted)
    assert exits(x, mask=mask, scale=2.0).shape == x.shape


def test_an_unknown_keyword_is_the_modules_error_and_names_the_branch():
    fusion = RoutedFusion(lambda x, **_: x, {"plain": nn.Linear(2, 3), "other": nn.Linear(2, 3)})
    with pytest.raises(TypeError, match="unexpected keyword argument 'flag'") as raised:
        fusion(torch.randn(N, 2), flag=True)
    assert raised.value.__notes__[0].startswith("in branch")


def test_keywords_are_explained_calibrated_and_compiled():
    fusion = RoutedFusion(
        lambda *, ids, **_: ids[:, :2], [Encoder(), Encoder()], execution="auto"
    ).eval()
    inputs = {"ids": torch.randn(N, 4), "mask": torch.ones(N, 3)}
    assert "routed" in str(fusion.explain(**inputs))
    fusion.calibrate(rounds=1, **inputs)
    fusion.execution = "routed"
    torch.compiler.reset()
    compiled = torch.compile(fusion, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            inputs["ids"] = torch.randn(N, 4)
            torch.testing.assert_close(compiled(**inputs), fusion(**inputs))
