"""EarlyExit against y = sum over d of w_d head_d(x_d), written out."""

import copy
import itertools
import pickle
import weakref

import pytest
import torch
from compiling import Counted, assert_agree
from layers import EXECUTIONS, GATE_GRADS, Layer, Steered, hard, left
from models import FEATURES, Calls, Function, assert_close, assert_same, backward
from stacks import HeaderReads
from torch import func, nn
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

from dynmm_kernels import Branch, EarlyExit, Lazy, Shared, resource_loss

L = 3
DEPTHS = {
    "mixed": [2, 0, 3, 1, 2],
    "two": [3, 1, 3],
    "none": [0, 0],
    "all": [3, 3, 3],
    "middle": [1, 1],
    "one": [2],
    "empty": [],
}
for_depths = pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
for_gradients = pytest.mark.parametrize("gate_grad", GATE_GRADS)
for_executions = pytest.mark.parametrize("execution", EXECUTIONS)
for_heads = pytest.mark.parametrize("with_heads", [False, True])
fp64 = {"dtype": torch.float64}


def inputs(size):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, FEATURES, generator=generator, **fp64), torch.rand(
        size, 1, generator=generator, **fp64
    )


def stream(with_heads=False):
    torch.manual_seed(2)
    heads = [nn.Linear(FEATURES, 2, **fp64) for _ in range(1 + L)] if with_heads else None
    return [Layer() for _ in range(L)], heads


def forced(depths):
    return one_hot(torch.tensor(depths, dtype=torch.int64), 1 + L).double()


@for_executions
@for_gradients
@for_heads
@for_depths
def test_gate(depths, with_heads, gate_grad, execution):
    (layers, heads), gate = stream(with_heads), Steered(depths, 1 + L)
    exits = EarlyExit(
        gate, layers, heads, execution=execution, gate_grad=gate_grad, temperature=0.7
    )

    def formula(x, mask):
        return left(hard(gate(x), gate_grad, 0.7), layers, heads, x, mask)

    given = inputs(len(depths))
    assert_same(backward(exits, [exits], given), backward(formula, [exits], given))
    exits.eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_close(exits(*given), formula(*given))


@pytest.mark.parametrize("execution", [*EXECUTIONS, "dense"])
@for_heads
@for_depths
def test_forced(depths, with_heads, execution):
    layers, heads = stream(with_heads)
    exits = EarlyExit(nn.Identity(), layers, heads, execution=execution)
    given, told = inputs(len(depths)), [torch.tensor(depths, dtype=torch.int64)]
    if len({*depths}) == 1:
        told.append(depths[0])
    formula = lambda *x: left(forced(depths), layers, heads, *x)  # noqa: E731
    for depth in told:
        own = backward(lambda *x, d=depth: exits(*x, depth=d), [exits], given)
        assert_same(own, backward(formula, [exits], given))
        with torch.no_grad():
            assert_close(exits(*given, depth=depth), formula(*given))


@for_heads
def test_dense_uniform_and_random(with_heads):
    (layers, heads), gate = stream(with_heads), Steered(DEPTHS["mixed"], 1 + L)
    exits, given = EarlyExit(gate, layers, heads, execution="dense"), inputs(5)
    formula = lambda *x: left(gate(x[0]).softmax(1), layers, heads, *x)  # noqa: E731
    assert_same(backward(exits, [exits], given), backward(formula, [exits], given))
    exits.execution = "routed"
    equal = torch.full((5, 1 + L), 1 / (1 + L), **fp64)
    assert_close(exits(*given, depth="uniform"), left(equal, layers, heads, *given))
    y, routing = exits(*given, depth="random", return_routing=True)
    assert_close(y, left(forced(routing.choice.tolist()), layers, heads, *given))


@for_executions
@for_depths
def test_one_head_for_all(depths, execution):
    (layers, _), gate, head = stream(), Steered(depths, 1 + L), nn.Linear(FEATURES, 2, **fp64)
    exits = EarlyExit(gate, layers, head, execution=execution)
    formula = lambda *x: head(  # noqa: E731
        left(hard(gate(x[0]), "straight_through"), layers, None, *x)
    )
    given = inputs(len(depths))
    assert_same(backward(exits, [exits], given), backward(formula, [exits], given))


@for_executions
def test_heads_of_other_shapes_and_structures(execution):
    """Layers may change the shape, and heads return what they like."""
    depths, sizes = [2, 0, 1, 2], [4, 6, 3]
    layers = [nn.Linear(a, b, **fp64) for a, b in itertools.pairwise(sizes)]
    linear = [nn.Linear(size, 2, **fp64) for size in sizes]
    heads = [Function(lambda x, h=h: {"y": h(x), "best": h(x).argmax(1)}) for h in linear]
    gate = Function(lambda x: x[:, :1] * 0 + one_hot(torch.tensor(depths), 3) * 1.0)
    exits = EarlyExit(gate, layers, heads, execution=execution)
    x = torch.randn(4, 4, **fp64)
    y = exits(x)
    for n, depth in enumerate(depths):
        row = x[n : n + 1]
        for layer in layers[:depth]:
            row = layer(row)
        assert_close(y["y"][n : n + 1], linear[depth](row))
        assert y["best"][n] == linear[depth](row).argmax()


@for_executions
def test_each_layer_runs_on_those_that_reach_it(execution, monkeypatch):
    (layers, heads), depths = stream(with_heads=True), DEPTHS["mixed"]
    calls, ends = Calls.of(layers), Calls.of(heads)
    exits = EarlyExit(nn.Identity(), layers, heads, execution=execution)
    reads = HeaderReads(monkeypatch)
    with torch.no_grad():
        _, routing = exits(*inputs(5), depth=torch.tensor(depths), return_routing=True)
    assert reads.count == 1
    counts = [sum(depth >= k for depth in depths) for k in range(1 + L)]
    if execution == "masked":
        counts = [5] * (1 + L)
    assert routing.rows_run == tuple(counts)
    assert calls.total() == counts[1:]
    assert ends.total() == ([5] * 4 if execution == "masked" else [1, 1, 2, 1])


def test_nothing_is_moved_where_all_have_one_depth(monkeypatch):
    layers, _ = stream()
    exits = EarlyExit(nn.Identity(), layers, execution="routed")
    calls = Calls.of(layers)
    monkeypatch.setattr("dynmm_kernels.functional.movement.gather_slots", None)
    monkeypatch.setattr("dynmm_kernels.functional.movement.combine_rows", None)
    x, mask = inputs(3)
    exits(x, mask, depth=2)
    assert calls.total() == [3, 3, 0]
    assert calls.arguments[0][0][0] is x


def test_rows_are_freed_as_samples_go_on():
    """In eval who left is kept, not what the others became on the way."""
    made, alive = [], []

    def layer(x):
        alive.append(sum(reference() is not None for reference in made))
        y = x * 2
        made.append(weakref.ref(y.untyped_storage()))
        return y

    exits = EarlyExit(nn.Identity(), [Function(layer) for _ in range(L)], execution="routed")
    with torch.no_grad():
        exits(inputs(5)[0], depth=torch.tensor(DEPTHS["mixed"]))
    assert max(alive) <= 1


@for_executions
def test_as_a_checkpoint(execution):
    (layers, heads), gate = stream(with_heads=True), Steered(DEPTHS["mixed"], 1 + L)
    exits, given = EarlyExit(gate, layers, heads, execution=execution), inputs(5)
    again = lambda *x: checkpoint(exits, *x, use_reentrant=False)  # noqa: E731
    assert_same(backward(again, [exits], given), backward(exits, [exits], given))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_pickled_and_loaded(again):
    layers, heads = stream(with_heads=True)
    exits = EarlyExit(Steered(DEPTHS["mixed"], 1 + L), layers, heads).eval()
    other = again(exits)
    other.load_state_dict(exits.state_dict())
    assert torch.equal(other(*inputs(5)), exits(*inputs(5)))


@for_executions
def test_a_layer_nobody_reaches_has_zero_gradients(execution):
    (layers, heads), (x, mask) = stream(with_heads=True), inputs(4)
    exits = EarlyExit(nn.Identity(), layers, heads, execution=execution)
    exits(x, mask.requires_grad_(), depth=1).sum().backward()
    for part in (*layers[1:], *heads[:1], *heads[2:]):
        for parameter in part.parameters():
            assert not parameter.grad.any()
    assert mask.grad.any()


@for_executions
@for_depths
@pytest.mark.parametrize("graph", [True, False])
def test_the_result_is_nobody_elses(graph, depths, execution):
    layers = [nn.Identity(), nn.Sigmoid(), nn.Identity()]
    exits = EarlyExit(nn.Identity(), layers, execution=execution)
    x, depth = inputs(len(depths))[0], torch.tensor(depths, dtype=torch.int64)
    before = x.clone()
    with torch.set_grad_enabled(graph):
        given = x.requires_grad_(graph) * 1
        y = exits(given, depth=depth)
        nn.functional.relu_(y.mul_(2))
        assert torch.equal(given.detach(), before)
    if graph:
        y.sum().backward()
        assert x.grad is not None


@for_executions
@for_gradients
@for_heads
@for_depths
def test_layers_and_heads_that_begin_in_place(depths, with_heads, gate_grad, execution):
    def begin_in_place(*modules):
        return nn.Sequential(nn.LeakyReLU(inplace=True), *modules)

    layers = [begin_in_place(nn.Linear(FEATURES, FEATURES, **fp64)) for _ in range(L)]
    layers[1] = begin_in_place()
    heads = [begin_in_place(nn.Linear(FEATURES, 2, **fp64)) for _ in range(1 + L)]
    heads = heads if with_heads else None
    gate = Steered(depths, 1 + L)
    exits = EarlyExit(gate, layers, heads, execution=execution, gate_grad=gate_grad)

    def fresh(modules):
        return modules and [lambda x, m=m: m(x.clone()) for m in modules]

    def formula(x):
        return left(hard(gate(x), gate_grad), fresh(layers), fresh(heads), x)

    given = inputs(len(depths))[:1]
    assert_same(backward(exits, [exits], given), backward(formula, [exits], given))


@for_executions
def test_a_layer_that_writes_without_a_word_is_refused(execution):
    layers = [nn.Identity(), Function(lambda x: x.mul_(2))]
    exits = EarlyExit(nn.Identity(), layers, execution=execution)
    with pytest.raises(ValueError, match="layer 2 must not write into its inputs"):
        exits(inputs(3)[0], depth=torch.tensor([2, 1, 2]))


@for_executions
@for_depths
def test_autocast(depths, execution):
    """One dtype whoever leaves where."""
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, FEATURES) for _ in range(L)]
    exits, x = (
        EarlyExit(nn.Identity(), layers, execution=execution),
        torch.randn(len(depths), FEATURES),
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = exits(x, depth=torch.tensor(depths, dtype=torch.int64))
        expected = left(forced(depths).float(), layers, None, x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    y.sum().backward()
    assert all(layer.weight.grad is not None for layer in layers)


@pytest.mark.parametrize("batch_norm", ["masked", "subset"])
def test_batch_norm(batch_norm):
    layers = [nn.BatchNorm1d(FEATURES, **fp64) for _ in range(2)]
    exits = EarlyExit(nn.Identity(), layers, execution="routed", batch_norm=batch_norm)
    depth, (x, _), alone = torch.tensor([2, 1, 2, 0, 2]), inputs(5), copy.deepcopy(layers)
    expected, rows = x.clone(), x
    for k, norm in enumerate(alone, start=1):
        reached = depth >= k
        if batch_norm == "masked":
            rows = norm(rows)
        else:
            rows = rows.clone()
            rows[reached] = norm(rows[reached])
        expected[reached] = rows[reached]
    assert_close(exits(x, depth=depth), expected)
    for mine, norm in zip(layers, alone, strict=True):
        assert_close(mine.running_mean, norm.running_mean)


@for_executions
@pytest.mark.parametrize("returns", ["probabilities", "weights"])
def test_what_the_gate_returns(returns, execution):
    (layers, _), gate = stream(), Steered(DEPTHS["mixed"], 1 + L)
    make = {
        "probabilities": lambda x, mask: gate(x).softmax(1),
        "weights": lambda x, mask: hard(gate(x), "straight_through"),
    }
    exits = EarlyExit(Function(make[returns]), layers, gate_returns=returns, execution=execution)
    formula = lambda *x: left(hard(gate(x[0]), "straight_through"), layers, None, *x)  # noqa: E731
    modules = [gate, *layers]
    assert_same(backward(exits, modules, inputs(5)), backward(formula, modules, inputs(5)))


def test_noise_is_drawn_while_training():
    exits = EarlyExit(Steered([1] * 100, 1 + L), stream()[0], noise="gumbel")
    x = inputs(100)
    _, routing = exits(*x, return_routing=True, generator=torch.Generator().manual_seed(0))
    assert 0 < (routing.choice != 1).sum() < 80
    _, routing = exits.eval()(*x, return_routing=True)
    assert routing.choice.tolist() == [1] * 100


@for_executions
def test_shared_and_lazy_tensors_beside_the_stream(execution):
    table, store = torch.randn(FEATURES, **fp64), torch.randn(5, FEATURES, **fp64)
    layers = [Function(lambda x, shared, rows: x * shared + rows) for _ in range(L)]
    exits = EarlyExit(nn.Identity(), layers, execution=execution)
    x, depths = inputs(5)[0], DEPTHS["mixed"]
    fetch = Lazy(lambda indices: store[indices])
    for own in (depths, [2] * 5):
        y = exits(x, Shared(table), fetch, depth=torch.tensor(own))
        assert_close(y, left(forced(own), layers, None, x, table, store))


@for_depths
def test_costs(depths):
    layers = [Branch(layer, cost=2 + k) for k, layer in enumerate(stream()[0])]
    heads = [Branch(nn.Linear(FEATURES, 2, **fp64), cost=0.5 * d) for d in range(1 + L)]
    gate = Branch(Steered(depths, 1 + L), cost=1)
    exits = EarlyExit(gate, layers, heads, execution="routed")
    given, own = inputs(len(depths)), (0, 2.5, 6, 10.5)
    with torch.no_grad():
        _, routing = exits(*given, return_routing=True)
    assert routing.costs == own
    assert routing.counts == tuple(depths.count(d) for d in range(1 + L))
    if depths:
        mean = sum(own[d] for d in depths) / len(depths)
        assert routing.executed_cost == pytest.approx(mean + 1)
    _, routing = exits(*given, return_routing=True)
    resource_loss(routing).backward()
    assert gate.module.linear.weight.grad is not None
    assert_close(routing.weights, forced(depths))


@for_gradients
@pytest.mark.parametrize("depths", [DEPTHS["mixed"], DEPTHS["middle"]])
def test_second_derivatives(depths, gate_grad):
    (layers, heads), gate = stream(with_heads=True), Steered(depths, 1 + L)
    exits = EarlyExit(gate, layers, heads, gate_grad=gate_grad, execution="routed")
    x, _ = inputs(len(depths))

    def twice(function):
        given = x.clone().requires_grad_()
        wanted = [given, *layers[0].parameters()]
        first = torch.autograd.grad((function(given) ** 3).sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), wanted)

    if gate_grad == "straight_through":
        with pytest.raises(RuntimeError, match="second derivative"):
            twice(exits)
        return
    formula = lambda given: left(hard(gate(given), gate_grad), layers, heads, given)  # noqa: E731
    for a, e in zip(twice(exits), twice(formula), strict=True):
        assert_close(a, e, 1e-10)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@for_gradients
def test_transforms(gate_grad):
    (layers, _), gate, (x, _) = stream(), Steered(DEPTHS["mixed"], 1 + L), inputs(5)
    exits = EarlyExit(gate, layers, gate_grad=gate_grad, execution="routed")
    formula = lambda given: left(hard(gate(given), gate_grad), layers, None, given)  # noqa: E731
    along = torch.ones_like(x)
    assert_close(func.jvp(exits, (x,), (along,)), func.jvp(formula, (x,), (along,)), 1e-10)
    assert_close(func.jacrev(exits)(x), func.jacrev(formula)(x), 1e-10)
    with pytest.raises(ValueError, match="not offered under vmap"):
        func.vmap(exits)(x.unsqueeze(0))
    exits.execution = "auto"
    assert_close(func.vmap(exits)(x.unsqueeze(0))[0], formula(x))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("execution", ["auto", "masked"])
def test_compiled_as_one_graph(execution):
    layers, heads = stream(with_heads=True)
    exits = EarlyExit(nn.Identity(), layers, heads, execution=execution)
    compiled = Counted(exits)
    for depths in (DEPTHS["mixed"], [0, 0, 1, 1, 0], [3] * 5):
        depth = torch.tensor(depths)
        assert_agree(
            backward(lambda *x, d=depth: compiled(*x, depth=d), [exits], inputs(5)),
            backward(lambda *x, d=depths: left(forced(d), layers, heads, *x), [exits], inputs(5)),
        )
    assert compiled.graphs == 1
    exits.execution = "routed"
    with pytest.raises(Exception, match="no graph for every split"):
        Counted(exits)(*inputs(5), depth=depth)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*is deprecated")
@for_gradients
def test_compiled_with_a_gate(gate_grad):
    (layers, heads), gate = stream(with_heads=True), nn.Linear(FEATURES, 1 + L, **fp64)
    exits = EarlyExit(Branch(gate, inputs=[0]), layers, heads, gate_grad=gate_grad)
    compiled = Counted(exits)
    for seed in range(3):
        given = (torch.randn(5, FEATURES, generator=torch.manual_seed(seed), **fp64), inputs(5)[1])
        formula = lambda *x: left(hard(gate(x[0]), gate_grad), layers, heads, *x)  # noqa: E731
        assert_agree(backward(compiled, [exits], given), backward(formula, [exits], given))
    assert compiled.graphs == 1


def test_the_faster_way_is_found_and_explained():
    exits = EarlyExit(Steered(DEPTHS["mixed"], 1 + L), stream()[0])
    assert "depth 3" in str(exits.calibrate(*inputs(5), rounds=2))


def test_masked_is_poisoned_by_a_layer_nobody_needs_and_routed_is_not():
    layers, x = [nn.Identity(), Function(lambda x: x / 0)], inputs(3)[0]
    for execution in ("routed", "masked"):
        y = EarlyExit(nn.Identity(), layers, execution=execution)(x, depth=1)
        assert y.isfinite().all() == (execution == "routed")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EarlyExit(nn.Identity(), []), ValueError, "layers is empty"),
        (lambda: EarlyExit(nn.Identity(), 3), TypeError, "must be a sequence of modules; got int"),
        (
            lambda: EarlyExit(nn.Identity(), [nn.Identity()], [nn.Identity()]),
            ValueError,
            "a head for each depth, 2 for 1 layers, or one module for all; got 1",
        ),
        (
            lambda: EarlyExit(nn.Linear(4, 3), [nn.Identity()])(torch.randn(2, 4)),
            ValueError,
            r"the gate must return logits of shape \[2, 2\]",
        ),
        (
            lambda: EarlyExit(nn.Identity(), [nn.Identity()])(torch.randn(2, 4), depth=2),
            ValueError,
            r"depth must be in 0\.\.1",
        ),
        (
            lambda: EarlyExit(nn.Identity(), [nn.Identity()])(
                torch.randn(2, 4), depth=torch.tensor([0, 2])
            ),
            ValueError,
            r"depth must be in 0\.\.1; got 2 in row 1",
        ),
        (
            lambda: EarlyExit(nn.Identity(), [nn.Identity()])([torch.randn(2, 4)], depth=1),
            TypeError,
            r"x must be a tensor \[N, \.\.\.\]; got list",
        ),
        (
            lambda: EarlyExit(nn.Identity(), [nn.Linear(4, 3)])(
                torch.randn(2, 4), depth=torch.tensor([0, 1])
            ),
            ValueError,
            "the input",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
