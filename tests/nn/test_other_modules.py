"""Modules of other people's models: their squeeze-and-excite additions, and their checkpoints."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dynmm_kernels import NestedFusion, RoutedFusion
from dynmm_kernels.nn import SEAdd, keep_keys

CHANNELS = 32


class Excite(nn.Module):
    """A squeeze-and-excite block of convolutions, pooling outside of its layers."""

    def __init__(self, layers=None, channels=CHANNELS):
        super().__init__()
        self.fc = layers or nn.Sequential(
            nn.Conv2d(channels, channels // 16, 1),
            nn.ReLU(),
            nn.Conv2d(channels // 16, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.fc(nn.functional.adaptive_avg_pool2d(x, 1))


class Attributes(nn.Module):
    """The same with its layers as attributes, other activations and no biases."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(CHANNELS, 4, 1, bias=False)
        self.act = nn.SiLU()
        self.expand = nn.Conv2d(4, CHANNELS, 1, bias=False)
        self.gate = nn.Hardsigmoid()

    def forward(self, x):
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(CHANNELS, 5), nn.Tanh(), nn.Linear(5, CHANNELS), nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.layers(x.mean((2, 3)))[:, :, None, None]


class FuseAdd(nn.Module):
    def __init__(self, make=Excite):
        super().__init__()
        self.se_rgb, self.se_depth = make(), make()

    def forward(self, rgb, depth):
        return self.se_rgb(rgb) + self.se_depth(depth)


class DepthFirst(FuseAdd):
    def __init__(self):
        nn.Module.__init__(self)
        self.se_depth, self.se_rgb = Excite(), Excite()


def maps(dtype=torch.float64):
    return [torch.randn(3, CHANNELS, 4, 5, dtype=dtype, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize(
    "theirs",
    [FuseAdd, lambda: FuseAdd(Attributes), lambda: FuseAdd(Linears), DepthFirst],
    ids=["convolutions", "attributes", "linear", "auxiliary first"],
)
def test_a_module_of_theirs_becomes_se_add_on_its_parameters(theirs):
    theirs = theirs().double()
    ours = SEAdd.from_(theirs)
    assert {*map(id, ours.parameters())} == {*map(id, theirs.parameters())}
    assert ours.channels == CHANNELS
    inputs = maps()
    tensors = [*inputs, *theirs.parameters()]
    weight = torch.randn(3, CHANNELS, 4, 5, dtype=torch.float64)
    outputs = [module(*inputs) for module in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad((output * weight).sum(), tensors) for output in outputs]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_is_recognised(dtype):
    for _ in range(20):
        SEAdd.from_(FuseAdd().to(dtype))


def test_the_mode_of_the_module_is_kept():
    theirs = FuseAdd()
    theirs.se_depth.eval()
    assert SEAdd.from_(theirs).training
    assert theirs.training
    assert not theirs.se_depth.training
    assert not SEAdd.from_(theirs.eval()).training


def test_what_is_no_squeeze_and_excite_addition_is_refused():
    with pytest.raises(ValueError, match=r"wanted two networks .* in Excite, .* found 1"):
        SEAdd.from_(Excite())
    uneven = FuseAdd()
    uneven.se_depth = Excite(channels=16)
    with pytest.raises(ValueError, match=r"found 2 that take C = \[32, 16\]"):
        SEAdd.from_(uneven)

    class Product(FuseAdd):
        def forward(self, rgb, depth):
            return self.se_rgb(rgb) * self.se_depth(depth)

    with pytest.raises(ValueError, match="Product computes something else than s \\* main"):
        SEAdd.from_(Product())

    class Functional(Excite):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(ValueError, match="computes something else"):
        SEAdd.from_(FuseAdd(Functional))


class Theirs(nn.Module):
    """A model of two streams, with names of its own."""

    def __init__(self):
        super().__init__()
        for stream in ("rgb", "depth"):
            for k in (1, 2):
                layer = nn.Sequential(
                    nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
                )
                setattr(self, f"encoder_{stream}_layer{k}", layer)
        self.se_layer1, self.se_layer2 = FuseAdd(), FuseAdd()
        self.gate_layer = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 3)
        )
        self.decoder = nn.Conv2d(CHANNELS, 2, 1)


class Ours(nn.Module):
    def __init__(self, net, holds=True):
        super().__init__()
        if holds:
            self.net = net
        self.stack = NestedFusion(
            lambda m, a: net.gate_layer(m),
            [net.encoder_rgb_layer1, net.encoder_rgb_layer2],
            [net.encoder_depth_layer1, net.encoder_depth_layer2],
            [SEAdd.from_(net.se_layer1), SEAdd.from_(net.se_layer2)],
        )
        self.own = nn.Linear(2, 2)


def assert_equal_states(one, other):
    assert {*one} == {*other}
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_model_around_theirs_saves_and_loads_their_checkpoints():
    net = Theirs()
    model = Ours(net)
    keep_keys(model, net)
    saved = model.state_dict()
    assert {*saved} - {*net.state_dict()} == {"own.weight", "own.bias"}
    assert_equal_states({k: saved[k] for k in net.state_dict()}, net.state_dict())

    checkpoint = {**Theirs().state_dict(), "own.weight": torch.eye(2), "own.bias": torch.ones(2)}
    model.load_state_dict(checkpoint)
    assert_equal_states(net.state_dict(), {k: checkpoint[k] for k in net.state_dict()})
    assert torch.equal(model.own.weight, torch.eye(2))
    Theirs().load_state_dict({k: v for k, v in model.state_dict().items() if "own" not in k})


def test_missing_and_unknown_keys_are_reported():
    net = Theirs()
    model = Ours(net)
    keep_keys(model, net)
    state = model.state_dict()
    del state["decoder.bias"]
    state["unknown.weight"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*net\.decoder\.bias.*Unexpected.*unknown"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).unexpected_keys == ["unknown.weight"]


def test_a_fusion_without_the_model_takes_what_it_has_of_a_checkpoint():
    net = Theirs()
    stack = Ours(net, holds=False).stack
    keep_keys(stack, net)
    assert {*stack.state_dict()} < {*net.state_dict()}
    checkpoint = Theirs().state_dict()
    result = stack.load_state_dict(checkpoint, strict=False)
    assert not result.missing_keys
    assert {*result.unexpected_keys} == {k for k in checkpoint if k.startswith(("gate", "decoder"))}
    weight = "encoder_depth_layer2.0.weight"
    assert torch.equal(stack.aux_stages[1].module[0].weight, checkpoint[weight])


def test_a_checkpoint_of_the_model_before_loads_too():
    net = Theirs()
    model = Ours(net)
    before = {
        name: torch.rand_like(v.float()).to(v.dtype) for name, v in model.state_dict().items()
    }
    keep_keys(model, net)
    model.load_state_dict(before)


def test_names_hold_within_a_larger_model_a_copy_and_a_pickle():
    net = nn.Linear(3, 2)
    model = nn.Sequential(RoutedFusion(nn.Linear(3, 2), [net, nn.Linear(3, 2)]))
    keep_keys(model[0], net)
    wanted = {"0.weight", "0.bias", "0.gate.module.weight", "0.gate.module.bias"}
    wanted |= {"0.branches.1.module.weight", "0.branches.1.module.bias"}
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {*twin.state_dict()} == wanted
        state = {name: torch.full_like(value, 2.0) for name, value in twin.state_dict().items()}
        twin.load_state_dict(state)
        assert all((p == 2).all() for p in twin.parameters())
        net.reset_parameters()


def test_models_that_share_nothing_or_whose_names_meet_are_refused():
    with pytest.raises(ValueError, match="Linear has no parameter or buffer of Theirs"):
        keep_keys(nn.Linear(2, 2), Theirs())
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), net[0])
    with pytest.raises(ValueError, match=r"other tensors under names of Sequential: 0\.bias"):
        keep_keys(model, net)
