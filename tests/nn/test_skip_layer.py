"""SkipLayer against y = w layer(x) + (1 - w) x, written out."""

import copy
import pickle

import pytest
import torch
from compiling import Counted, assert_agree
from layers import EXECUTIONS, GATE_GRADS, Layer, Steered, hard, learning, skipped
from models import FEATURES, Calls, Function, assert_close, assert_same, backward
from torch import func, nn
from torch.utils.checkpoint import checkpoint

from dynmm_kernels import Branch, Lazy, RoutedFusion, Shared, SkipLayer, ops, resource_loss

KEPT = {"some": [0, 1, 1, 0, 1], "none": [0] * 5, "all": [1] * 5, "one": [1], "empty": []}

for_kept = pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
for_gradients = pytest.mark.parametrize("gate_grad", GATE_GRADS)
for_executions = pytest.mark.parametrize("execution", EXECUTIONS)
fp64 = {"dtype": torch.float64}


def inputs(size, *shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, *(shape or (FEATURES,)), generator=generator, **fp64), torch.rand(
        size, 1, generator=generator, **fp64
    )


@for_executions
@for_gradients
@for_kept
def test_gate(kept, gate_grad, execution):
    layer, gate = Layer(), Steered(kept, 2)
    skip = SkipLayer(layer, gate, gate_grad=gate_grad, execution=execution, temperature=0.7)

    def formula(x, mask):
        return skipped(hard(gate(x), gate_grad, 0.7), layer, x, mask)

    given = inputs(len(kept))
    assert_same(backward(skip, [skip], given), backward(formula, [skip], given))
    skip.eval()
    with torch.no_grad():
        assert_close(skip(*given), formula(*given))
    with torch.inference_mode():
        assert_close(skip(*given), formula(*given))


@for_gradients
@for_kept
def test_weights_that_were_drawn_elsewhere(kept, gate_grad):
    """As in ADMN: one straight-through decision for all layers."""
    layers = [Layer(), Layer()]
    own = nn.Linear(FEATURES, len(layers), **fp64)
    skips = [SkipLayer(layer, gate_grad=gate_grad) for layer in layers]
    chosen = torch.stack([torch.tensor(kept), 1 - torch.tensor(kept)], 1).double()

    def decide(x):
        soft = own(x).sigmoid()
        return chosen - soft.detach() + soft

    def together(x, mask):
        for skip, keep in zip(skips, decide(x).unbind(1), strict=True):
            x = skip(x, mask, keep=keep)
        return x

    def formula(x, mask):
        for layer, keep in zip(layers, decide(x).unbind(1), strict=True):
            both = torch.stack([1 - keep, keep], 1)
            x = skipped(learning(both, both.detach(), gate_grad), layer, x, mask)
        return x

    given, modules = inputs(len(kept)), [own, *layers]
    assert_same(backward(together, modules, given), backward(formula, modules, given))


@pytest.mark.parametrize("execution", [*EXECUTIONS, "dense"])
@for_kept
def test_forced(kept, execution):
    layer, keep = Layer(), torch.tensor(kept, dtype=torch.bool)
    skip = SkipLayer(layer, execution=execution)
    weights = torch.stack([~keep, keep], 1).double()
    given, told = inputs(len(kept)), [keep, keep.double()]
    if len({*kept}) == 1:
        told.append(bool(kept[0]))
    for own in told:
        agree = [
            backward(lambda *x, own=own: skip(*x, keep=own), [layer], given),
            backward(lambda *x: skipped(weights, layer, *x), [layer], given),
        ]
        assert_same(*agree)
        with torch.no_grad():
            assert_close(skip(*given, keep=own), skipped(weights, layer, *given))


def test_dense():
    layer, gate = Layer(), nn.Linear(FEATURES, 2, **fp64)
    skip = SkipLayer(layer, Branch(gate, inputs=[0]), execution="dense")
    formula = lambda x, mask: skipped(gate(x).softmax(1), layer, x, mask)  # noqa: E731
    assert_same(backward(skip, [skip], inputs(5)), backward(formula, [skip], inputs(5)))


@for_executions
@pytest.mark.parametrize("returns", ["probabilities", "weights"])
def test_what_the_gate_returns(returns, execution):
    layer, gate = Layer(), Steered(KEPT["some"], 2)
    soft = nn.Sequential(gate, nn.Softmax(1))
    drawn = Function(lambda x, mask: hard(gate(x), "straight_through"))
    given = Branch(soft if returns == "probabilities" else drawn, inputs=None)
    if returns == "probabilities":
        given = Branch(soft, inputs=[0])
    skip = SkipLayer(layer, given, gate_returns=returns, execution=execution)

    def formula(x, mask):
        return skipped(hard(gate(x), "straight_through"), layer, x, mask)

    modules = [gate, layer]
    assert_same(backward(skip, modules, inputs(5)), backward(formula, modules, inputs(5)))


def test_noise_is_drawn_while_training():
    skip = SkipLayer(Layer(), Steered([0, 1] * 50, 2), noise="gumbel")
    x, _ = inputs(100)
    _, routing = skip(x, return_routing=True, generator=torch.Generator().manual_seed(0))
    assert 0 < (routing.choice != torch.tensor([0, 1] * 50)).sum() < 50
    _, routing = skip.eval()(x, return_routing=True)
    assert routing.choice.tolist() == [0, 1] * 50


@for_executions
def test_structures_shared_tensors_and_one_tensor_read_thrice(execution):
    table = torch.randn(FEATURES, **fp64)

    def layer(pair, third, table):
        assert pair[0] is third
        return pair[0] * table, pair[1] + 1

    x, ids, keep = inputs(4)[0], torch.arange(4), torch.tensor([True, False, True, False])
    skip = SkipLayer(Function(layer), execution=execution)
    rows, numbers = skip((x, ids), x, Shared(table), keep=keep)
    assert_close(rows, torch.where(keep[:, None], x * table, x))
    assert numbers.tolist() == [1, 1, 3, 3]


def test_who_skips_is_not_moved(monkeypatch):
    """The layer sees its own samples; in neither direction are the others gathered."""
    layer, keep = Layer(), torch.tensor([True, False, False, False])
    calls, skip = Calls.of([layer]), SkipLayer(layer, execution="routed")
    kernels, moved = ops.kernels(), []

    class Watched:
        def __getattr__(self, name):
            return getattr(kernels, name)

        def gather_rows(self, sources, starts, stops, *others):
            moved.extend(stop - start for start, stop in zip(starts, stops, strict=True))
            return kernels.gather_rows(sources, starts, stops, *others)

    monkeypatch.setattr(ops, "kernels", Watched)
    x = torch.randn(4, FEATURES, **fp64).requires_grad_()
    skip(x, keep=keep).sum().backward()
    assert calls.rows == [[1]]
    assert moved == [1, 1]


@for_executions
@for_kept
@pytest.mark.parametrize("graph", [True, False])
def test_the_result_is_nobody_elses(graph, kept, execution):
    """Writing into it changes neither the batch nor what a layer kept."""
    for layer in (nn.Identity(), Layer(), nn.Sequential(nn.Sigmoid())):
        x, keep = inputs(len(kept))[0], torch.tensor(kept, dtype=torch.bool)
        before = x.clone()
        with torch.set_grad_enabled(graph):
            given = x.requires_grad_(graph) * 1
            y = SkipLayer(layer, execution=execution)(given, keep=keep)
            assert_close(given.detach(), before)
            nn.functional.relu_(y.mul_(2))
            assert_close(given.detach(), before)
        if graph:
            y.sum().backward()
            assert x.grad is not None


@for_executions
@for_gradients
@for_kept
def test_layers_that_begin_in_place(kept, gate_grad, execution):
    layer = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(FEATURES, FEATURES, **fp64))
    gate = Steered(kept, 2)
    skip = SkipLayer(layer, gate, gate_grad=gate_grad, execution=execution)

    def formula(x):
        return skipped(hard(gate(x), gate_grad), lambda rows: layer(rows.clone()), x)

    given = inputs(len(kept))[:1]
    assert_same(backward(skip, [skip], given), backward(formula, [skip], given))


@for_executions
@for_kept
def test_autocast(kept, execution):
    """One dtype whoever skips: fp32 of the batch and bf16 of the layer are fp32."""
    torch.manual_seed(0)
    layer, x = nn.Linear(FEATURES, FEATURES), torch.randn(len(kept), FEATURES)
    keep = torch.tensor(kept, dtype=torch.bool)
    skip = SkipLayer(layer, execution=execution)
    with torch.autocast("cpu", torch.bfloat16):
        y = skip(x, keep=keep)
        expected = torch.where(keep[:, None], layer(x).float(), x)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected) if execution == "masked" else torch.allclose(y, expected)
    y.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("batch_norm", ["masked", "subset"])
def test_batch_norm(batch_norm):
    layer = nn.Sequential(nn.BatchNorm1d(FEATURES, **fp64))
    keep = torch.tensor([True, False, True, True, False])
    skip = SkipLayer(layer, execution="routed", batch_norm=batch_norm)
    alone, (x, _) = copy.deepcopy(layer), inputs(5)
    rows = alone(x if batch_norm == "masked" else x[keep])
    expected = x.clone()
    expected[keep] = rows[keep] if batch_norm == "masked" else rows
    assert_close(skip(x, keep=keep), expected)
    assert_close(layer[0].running_mean, alone[0].running_mean)


def test_nobody_runs_where_masked_would_be_poisoned():
    layer = Function(lambda x: x / 0)
    x, keep = inputs(3)[0], torch.tensor([False, False, True])
    assert SkipLayer(layer, execution="routed")(x, keep=keep)[:2].isfinite().all()
    assert not SkipLayer(layer, execution="masked")(x, keep=keep)[:2].isfinite().any()


@for_kept
def test_routing(kept):
    gate = Branch(Steered(kept, 2), inputs=[0], cost=0.5)
    skip = SkipLayer(Branch(Layer(), cost=4), gate, execution="routed")
    given, runs = inputs(len(kept)), sum(kept)
    _, routing = skip.eval()(*given, return_routing=True)
    share = max(1, len(kept))
    assert routing.choice.tolist() == kept
    assert routing.counts == (len(kept) - runs, runs)
    with torch.no_grad():
        _, routing = skip(*given, return_routing=True)
    assert routing.costs == (0, 4)
    if kept:
        assert routing.rows_run == (len(kept) - runs, runs)
        assert routing.executed_cost == pytest.approx(4 * runs / share + 0.5)
        assert resource_loss(routing).isfinite()
    _, routing = skip.train()(*given, return_routing=True)
    resource_loss(routing).backward()
    assert gate.module.linear.weight.grad is not None


def test_the_faster_way_is_found_and_explained():
    skip = SkipLayer(Layer(), Steered(KEPT["some"], 2))
    text = str(skip.calibrate(*inputs(5), rounds=2))
    assert "skip" in text
    assert "the layer" in text


@pytest.mark.parametrize("gate_grad", GATE_GRADS)
@pytest.mark.parametrize("kept", [KEPT["some"], KEPT["none"], KEPT["all"]])
def test_second_derivatives(kept, gate_grad):
    layer, gate, (x, _) = Layer(), Steered(kept, 2), inputs(5)
    skip = SkipLayer(layer, gate, gate_grad=gate_grad, execution="routed")

    def twice(function):
        given = x.clone().requires_grad_()
        wanted = [given, *layer.parameters()]
        y = function(given)
        first = torch.autograd.grad((y**3).sum(), wanted, create_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        return torch.autograd.grad(penalty, wanted)

    if gate_grad == "straight_through":
        with pytest.raises(RuntimeError, match="second derivative"):
            twice(skip)
        return
    formula = lambda given: skipped(hard(gate(given), gate_grad), layer, given)  # noqa: E731
    for a, e in zip(twice(skip), twice(formula), strict=True):
        assert_close(a, e, 1e-10)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@for_gradients
def test_transforms(gate_grad):
    layer, gate, (x, _) = Layer(), Steered(KEPT["some"], 2), inputs(5)
    skip = SkipLayer(layer, gate, gate_grad=gate_grad, execution="routed")
    formula = lambda given: skipped(hard(gate(given), gate_grad), layer, given)  # noqa: E731
    along = torch.ones_like(x)
    assert_close(func.jvp(skip, (x,), (along,)), func.jvp(formula, (x,), (along,)), 1e-10)
    assert_close(func.jacrev(skip)(x), func.jacrev(formula)(x), 1e-10)
    with pytest.raises(ValueError, match="not offered under vmap"):
        func.vmap(skip)(x.unsqueeze(0))
    skip.execution = "auto"
    assert_close(func.vmap(skip)(x.unsqueeze(0))[0], formula(x))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_compiled_as_one_graph(execution):
    layer = Layer()
    skip = SkipLayer(layer, execution=execution)
    compiled = Counted(skip)
    for kept in (KEPT["some"], KEPT["none"], KEPT["all"], [1, 0, 0, 0, 1]):
        keep = torch.tensor(kept, dtype=torch.bool)
        weights = torch.stack([~keep, keep], 1).double()
        assert_agree(
            backward(lambda *x, keep=keep: compiled(*x, keep=keep), [layer], inputs(5)),
            backward(lambda *x, weights=weights: skipped(weights, layer, *x), [layer], inputs(5)),
        )
    assert compiled.graphs == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*is deprecated")
@for_gradients
def test_compiled_with_a_gate(gate_grad):
    layer, gate = Layer(), nn.Linear(FEATURES, 2, **fp64)
    skip = SkipLayer(layer, Branch(gate, inputs=[0]), gate_grad=gate_grad, execution="routed")
    compiled = Counted(skip)
    for seed in range(3):
        given = (torch.randn(5, FEATURES, generator=torch.manual_seed(seed), **fp64), inputs(5)[1])
        formula = lambda x, mask: skipped(hard(gate(x), gate_grad), layer, x, mask)  # noqa: E731
        assert_agree(backward(compiled, [skip], given), backward(formula, [skip], given))
    assert compiled.graphs == 1


def test_every_call_calls_the_layer_where_that_is_asked_for():
    layer = Layer()
    calls, skip = Calls.of([layer]), SkipLayer(layer, execution="routed", starved="run")
    x, _ = inputs(5)
    assert_close(skip(x, keep=False), x)
    assert calls.rows == [[2]]


def test_vision_transformer():
    """Like ADMN: blocks with attention, a padding mask beside, gradients of all layers."""
    torch.manual_seed(0)
    blocks = [
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True, **fp64)
        for _ in range(3)
    ]
    skips = [SkipLayer(block) for block in blocks]
    x, padding = torch.randn(4, 5, 8, **fp64), torch.rand(4, 5) > 0.7
    padding[:, 0] = False
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)

    def routed(x):
        for skip, row in zip(skips, keep, strict=True):
            x = skip(x, None, padding, keep=row)
        return x

    def formula(x):
        for block, row in zip(blocks, keep, strict=True):
            weights = torch.stack([~row, row], 1).double()
            x = skipped(weights, lambda x, b=block: b(x, None, padding), x)
        return x

    assert_same(backward(routed, blocks, (x,)), backward(formula, blocks, (x,)))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_and_pickled(again):
    skip, given = SkipLayer(Layer(), Steered(KEPT["some"], 2)).eval(), inputs(5)
    assert torch.equal(again(skip)(*given), skip(*given))


@for_executions
def test_a_stream_that_is_fetched(execution):
    """Then x is all that tells of it; those that skip need it, too."""
    x, keep = inputs(5)[0], torch.tensor(KEPT["some"], dtype=torch.bool)
    skip = SkipLayer(Function(lambda x: x * 2), execution=execution)
    y = skip(Lazy(lambda indices: x[indices]), keep=keep)
    assert_close(y, torch.where(keep[:, None], x * 2, x))


@for_executions
def test_as_a_checkpoint(execution):
    layer, gate, given = Layer(), Steered(KEPT["some"], 2), inputs(5)
    skip = SkipLayer(layer, gate, execution=execution)
    again = lambda *x: checkpoint(skip, *x, use_reentrant=False)  # noqa: E731
    assert_same(backward(again, [skip], given), backward(skip, [skip], given))


def test_a_layer_that_is_exchanged_keeps_its_name():
    skip = SkipLayer(Layer())
    skip.layer, skip.gate = nn.Linear(FEATURES, FEATURES, **fp64), Steered([0], 2)
    x = inputs(1)[0]
    assert torch.equal(skip(x), x)
    assert skip.layer.label == "the layer"
    assert sorted({name.split(".")[0] for name in skip.state_dict()}) == ["gate", "layer"]


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (None, ValueError, "wanted keep=, because it has no gate"),
        (torch.ones(4, dtype=torch.bool), ValueError, r"keep must have shape \[3\]; got \[4\]"),
        (torch.ones(3, 1), ValueError, r"keep must have shape \[3\]; got \[3, 1\]"),
        (torch.tensor([0.0, 0.5, 1.0]), ValueError, r"keep's weights .* in row 1"),
        (torch.tensor([0, 1, 1]), TypeError, "keep must be a bool, .* got torch.int64"),
        (1, TypeError, "got int"),
        (torch.ones(3, dtype=torch.bool, device="meta"), ValueError, "keep must be on cpu"),
    ],
)
def test_bad_decisions(keep, error, message):
    with pytest.raises(error, match=message):
        SkipLayer(nn.Identity())(torch.randn(3, 2), keep=keep)


@for_executions
@pytest.mark.parametrize("keep", [True, torch.tensor([True, False, True])])
def test_what_a_layer_must_return(keep, execution):
    skip = SkipLayer(nn.Linear(4, 2), execution=execution)
    with pytest.raises(ValueError, match=r"the (layer|input)"):
        skip(torch.randn(3, 4), keep=keep)


def test_gate_of_another_width():
    with pytest.raises(ValueError, match=r"the gate must return logits of shape \[3, 2\]"):
        SkipLayer(nn.Identity(), nn.Linear(4, 1))(torch.randn(3, 4))


def test_does_what_a_fusion_with_an_identity_does():
    layer, gate = Layer(), Steered(KEPT["some"], 2)
    fusion = RoutedFusion(gate, [Branch(nn.Identity(), inputs=[0]), layer], execution="routed")
    skip = SkipLayer(layer, gate, execution="routed")
    assert_same(backward(skip, [skip], inputs(5)), backward(fusion, [skip], inputs(5)))
