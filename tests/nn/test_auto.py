"""`execution="auto"` in the fusions: both ways give the user's result, and calls are what teaches.

How the chooser weighs what it is told is in test_chooser.py.
"""

import copy
import json
import pickle
import warnings

import pytest
import torch
from models import (
    FEATURES,
    Calls,
    Function,
    assert_same,
    backward,
    choosing,
    masked_fusion,
    mlp,
    toy,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmm_kernels import Branch, ChainedFusion, NestedFusion, RoutedFusion
from dynmm_kernels.functional.tree import Lazy
from dynmm_kernels.nn import Add, stopwatch


@pytest.fixture(autouse=True)
def no_warnings():
    """A masked run that fails is only warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def batch(rows: int = 12) -> Tensor:
    return torch.randn(rows, FEATURES).double()


def in_way(fusion: nn.Module, way: str) -> nn.Module:
    fusion.chooser.forced = way, False
    return fusion


def nested(**options) -> NestedFusion:
    stages = [nn.Linear(4, 4).double() for _ in range(4)]
    depths = choosing([0, 2, 1, 2, 0, 1], 3)
    return NestedFusion(depths, stages[:2], stages[2:], [Add(), Add()], **options)


def chained(**options) -> ChainedFusion:
    stages = [nn.Linear(4, 4).double() for _ in range(4)]
    gates = [choosing([1, 0, 1, 1, 0, 1], 2), choosing([1, 1, 0, 1, 0, 1], 2)]
    if options.get("execution", "auto") != "masked":
        gates = [Deciding(), Deciding()]
    return ChainedFusion(gates, stages[:2], stages[2:], [Add(), Add()], **options)


class Deciding(nn.Module):
    """A gate that learns; for any number of rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2).double()

    def forward(self, main, aux):
        return self.linear(main + aux)


@pytest.mark.parametrize("gate_grad", ["straight_through", "selected", "none"])
@pytest.mark.parametrize("select", [1, 2, "multi_hot"])
def test_masked_by_choice_is_masked(gate_grad, select):
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, select=select, gate_grad=gate_grad)
    x = batch()
    chosen = backward(in_way(fusion, "masked"), [fusion], (x,))
    fusion.execution = "masked"
    assert_same(chosen, backward(fusion, [fusion], (x,)))
    fusion.execution = "routed"
    assert_same(chosen, backward(fusion, [fusion], (x,)))


@pytest.mark.parametrize("counts", [[0, 1, 2, 1], [1, 1, 1, 1], [2, 0, 2, 0]])
def test_masked_by_choice_against_plain_autograd(counts):
    gate, (_, branches) = choosing(counts, 3), toy()
    fusion, x = RoutedFusion(gate, branches), batch(4)
    masked = masked_fusion(gate, branches)
    modules = [gate, *branches]
    assert_same(backward(in_way(fusion, "masked"), modules, (x,)), backward(masked, modules, (x,)))


@pytest.mark.parametrize("make", [nested, chained])
@pytest.mark.parametrize("gate_grad", ["straight_through", "selected", "none"])
def test_a_stack_masked_by_choice_is_masked(make, gate_grad):
    fusion = make(gate_grad=gate_grad)
    inputs = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    chosen = backward(in_way(fusion, "masked"), [fusion], inputs)
    routed = backward(in_way(fusion, "routed"), [fusion], inputs)
    fusion.execution = "masked"
    assert_same(chosen, backward(fusion, [fusion], inputs))
    assert_same(chosen, routed)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("selected", [Branch, lambda m: Branch(m, inputs=lambda x: x)])
def test_nan_of_a_branch_that_was_not_chosen_stays_there(learns, selected):
    """The short way and the general one, with a gate that learns and without a graph."""
    bad = [Function(lambda x: x / (x[:, :1] > 0)), Function(lambda x: x * 2)]
    x = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [-2.0, 4.0]])
    fusion = RoutedFusion(choosing([0, 1, 1], 2), [selected(m) for m in bad]).train(learns)
    expected = torch.tensor([[1.0, 2.0], [-2.0, 6.0], [-4.0, 8.0]])
    with torch.set_grad_enabled(learns):
        assert torch.equal(in_way(fusion, "masked")(x), expected)
        fusion.execution = "masked"
        assert not fusion(x).isfinite().all()


def test_nan_in_a_stack_stays_there():
    fusion = NestedFusion(
        choosing([1, 0], 2), [nn.Identity()], [nn.Identity()], [Function(lambda m, a: m / a)]
    )
    main, aux = torch.ones(2, 3), torch.tensor([[2.0] * 3, [0.0] * 3])
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            output = in_way(fusion, "masked")(main, aux)
        assert torch.equal(output, torch.tensor([[0.5] * 3, [1.0] * 3]))


@pytest.mark.parametrize("training", [True, False])
def test_both_ways_are_tried_and_nothing_runs_twice(training):
    gate, branches = choosing([0, 1] * 6, 2), [mlp(), mlp()]
    fusion, calls, x = RoutedFusion(gate, branches).train(training), Calls.of(branches), batch()
    seen = set()
    with torch.set_grad_enabled(training):
        for _ in range(20):
            calls.clear()
            output = fusion(x)
            if training:
                output.sum().backward()
            rows = sorted(calls.rows[0])
            assert rows in ([12], [6, 6] if training else [6])
            seen.add(tuple(rows))
        explained = fusion.explain(x)
    assert len(seen) == 2
    assert explained.counts == {"branch '0'": 6, "branch '1'": 6}
    assert all(known.calls >= 2 for known in explained.estimates.values())
    assert str(explained).startswith(f"{explained.way}: ")
    assert "measured" in str(explained)


def test_the_backward_pass_is_measured(monkeypatch):
    now = [0.0]

    def slow(seconds: float):
        """Takes time in its backward pass alone."""

        class Slow(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                now[0] += seconds
                return grad

        return Function(Slow.apply)

    monkeypatch.setattr(stopwatch.HostClock, "mark", staticmethod(lambda: now[0]))
    fusion = RoutedFusion(choosing([0, 1], 2), [slow(0.01), nn.Identity()])
    fusion = nn.Sequential(slow(0.3), fusion)  # what comes before the fusion is not its own
    for _ in range(8):
        fusion(batch(2).requires_grad_() * 1).sum().backward()
    estimates = fusion[1].explain(batch(2)).estimates
    assert [known.measured for known in estimates.values()] == [pytest.approx(0.01)] * 2


def test_explain_says_why_there_was_no_choice():
    gate, branches = toy(2)
    x = batch()
    fusion = RoutedFusion(gate, branches, execution="routed").eval()
    assert "execution is 'routed'" in str(fusion.explain(x))
    fusion = RoutedFusion(choosing([1] * 12, 2), branches).eval()
    with torch.no_grad():
        assert "one branch takes the whole batch" in str(fusion.explain(x))
    lazy = Lazy(lambda indices: x[indices])
    general = RoutedFusion(
        choosing([0, 1] * 6, 2), [Function(lambda x, y: y)] * 1 + [Function(lambda x, y: x)]
    )
    assert "Lazy" in str(general.explain(x, lazy))


def test_a_lazy_modality_is_only_fetched_where_it_is_needed():
    x, fetched = batch(), []

    def fetch(indices):
        fetched.append(len(indices))
        return x[indices]

    costly = Branch(mlp(), inputs=[1])
    gate = Branch(choosing([0, 0, 1] * 4, 2), inputs=[0])
    fusion = RoutedFusion(gate, [Branch(mlp(), inputs=[0]), costly]).eval()
    with torch.no_grad():
        for _ in range(20):
            fusion(x, Lazy(fetch))
    assert set(fetched) == {4}


def test_a_branch_that_is_not_made_for_every_sample_is_only_routed():
    def picky(x):
        if (x < 0).any():
            raise ValueError("negative")
        return x

    x = torch.tensor([[1.0], [-1.0], [2.0]])
    fusion = RoutedFusion(choosing([0, 1, 0], 2), [Function(picky), nn.Identity()]).eval()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="masked execution failed with ValueError: negative"):
            outputs = [fusion(x) for _ in range(20)]
        assert all(torch.equal(output, x) for output in outputs)
        assert "negative" in fusion.explain(x).why


def test_checkpointing_finds_the_same_graph():
    gate, branches = choosing([0, 1] * 6, 2), [mlp(), mlp()]
    fusion, x = RoutedFusion(gate, branches), batch().requires_grad_()
    for _ in range(12):
        checkpoint(fusion, x, use_reentrant=False).sum().backward()


def test_transforms_and_forward_mode_are_routed():
    fusion, x = RoutedFusion(choosing([0, 1] * 6, 2), [mlp(), mlp()]), batch()
    for _ in range(12):
        torch.func.jvp(fusion, (x,), (x,))
    assert "forward-mode" in fusion.chooser.last


@pytest.mark.parametrize("training", [True, False])
def test_calibrate_leaves_no_trace(training):
    fusion = RoutedFusion(
        choosing([0, 1] * 6, 2),
        [nn.Sequential(mlp(), nn.BatchNorm1d(3).double(), nn.Dropout()), mlp()],
    ).train(training)
    before, x = copy.deepcopy(fusion.state_dict()), batch()
    draw = torch.get_rng_state()
    explained = fusion.calibrate(x, rounds=4)
    assert all(known.calls == 4 for known in explained.estimates.values())
    assert torch.equal(draw, torch.get_rng_state())
    for name, value in fusion.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in fusion.parameters())
    assert fusion.training is training
    assert explained.recorded == ("straight_through" if training else "forward")


@pytest.mark.parametrize("make", [nested, chained])
def test_stacks_calibrate_and_explain(make):
    fusion = make()
    inputs = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    explained = fusion.calibrate(*inputs, rounds=3)
    assert all(known.calls == 3 for known in explained.estimates.values())
    assert fusion.explain(*inputs).way in ("routed", "masked")
    assert ("depth 2" in explained.counts) == (make is nested)


@pytest.mark.parametrize(
    ("options", "got"), [({"execution": "routed"}, "'routed'"), ({}, "rounds=0")]
)
def test_calibrate_refuses(options, got):
    fusion = RoutedFusion(*toy(2), **options)
    with pytest.raises(
        ValueError, match=r"calibrate: wanted execution='auto' and rounds >= 1.*" + got
    ):
        fusion.calibrate(batch(), rounds=3 if options else 0)


def test_what_was_learnt_is_saved_apart_from_the_model():
    fusion, x = RoutedFusion(choosing([0, 1] * 6, 2), [mlp(), mlp()]), batch()
    fusion.calibrate(x, rounds=3)
    assert all("chooser" not in name for name in fusion.state_dict())
    state = json.loads(json.dumps(fusion.auto_state()))
    other = RoutedFusion(choosing([0, 1] * 6, 2), [mlp(), mlp()])
    other.load_auto_state(state)
    assert other.auto_state() == fusion.auto_state()
    for copied in (copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        assert copied.auto_state() == fusion.auto_state()
    with pytest.raises(ValueError, match="load_auto_state"):
        other.load_auto_state({"weights": 1})


def test_an_empty_batch_and_one_sample():
    fusion = RoutedFusion(*toy(2)).eval()
    for rows in (0, 1):
        for _ in range(12):
            assert fusion(batch(rows)).shape == (rows, 3)
            with torch.no_grad():
                assert fusion(batch(rows)).shape == (rows, 3)
