"""Cascades that call every stage in every call: starved="run", and one graph for every split."""

import copy

import pytest
import torch
from compiling import Counted, assert_agree
from models import FEATURES, backward, mlp
from torch import nn
from torch.export import Dim

from dynmm_kernels import Branch, CascadeFusion, Lazy, deep_supervision_loss

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
]

N, STAGES = 9, 3


class Sure(nn.Module):
    """A network that is sure of the samples whose first number is at least `level`."""

    def __init__(self, level):
        super().__init__()
        self.own, self.level = mlp(), level

    def forward(self, x):
        sure = 9.0 * (x[:, :1] >= self.level)
        return torch.tanh(self.own(x)) + torch.nn.functional.pad(sure, (0, 2))


class Weigh(nn.Module):
    """A fuse with a weight for each stage."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.5, 0.8, 2.0], dtype=torch.float64))

    def forward(self, logits):
        return sum(w * x for w, x in zip(self.weights, logits, strict=False))


FUSES = {"energy": lambda: "energy", "mean": lambda: "mean", "last": lambda: "last", "own": Weigh}
for_fuses = pytest.mark.parametrize("fuse", FUSES)


def cascade(fuse="energy", **settings):
    """Samples whose first number is 2 leave first, those of 1 second, those of 0 at the end."""
    torch.manual_seed(5)
    stages = [Branch(Sure(level), inputs=[s], cost=1.0) for s, level in enumerate((2, 1, 0))]
    settings = {"execution": "routed", "threshold": 0.6, **settings}
    return CascadeFusion(stages, fuse=FUSES[fuse](), **settings).eval()


def pair(fuse="energy", **settings):
    """One that calls all stages, and one that does not."""
    fusion = cascade(fuse, **settings)
    skipping = copy.deepcopy(fusion)
    fusion.starved = "run"
    return fusion, skipping


def inputs(levels):
    """One per stage, for samples that leave where they are told."""
    x = torch.randn(STAGES, len(levels), FEATURES, dtype=torch.float64)
    x[:, :, 0] = levels
    return tuple(x)


def splits(count, size=N):
    """Samples of mixed levels, of two, of one."""
    for step in range(count):
        low, high = (step % 3, step % 3) if step % 4 == 0 else (step % 2, 2 - step % 3 // 2)
        yield torch.randint(min(low, high), max(low, high) + 1, (size,))


def calls_of(fusion):
    """Who was called since it was emptied, and with how many rows."""
    calls = []
    parts = [stage.module for stage in fusion.stages]
    parts += [fusion.fuse.module] if isinstance(fusion.fuse, nn.Module) else []
    for i, part in enumerate(parts):
        part.register_forward_hook(lambda *seen, i=i: calls.append((i, len(seen[2]))))
    return calls


@for_fuses
def test_as_without_and_called_as_often(fuse):
    fusion, skipping = pair(fuse)
    calls, orders = calls_of(fusion), set()
    for levels in splits(12):
        x = inputs(levels)
        calls.clear()
        assert_agree(*(backward(f, [f], x) for f in (fusion, skipping)))
        orders.add(tuple(i for i, _ in calls))
        assert min(rows for _, rows in calls) >= 2
        (_, actual), (_, expected) = (f(*x, return_routing=True) for f in (fusion, skipping))
        assert torch.equal(actual.choice, 2 - levels)
        assert torch.equal(actual.choice, expected.choice)
        assert actual.counts == expected.counts
        assert actual.rows_run == tuple(max(rows, 2) for rows in expected.rows_run)
    assert len(orders) == 1


@for_fuses
@pytest.mark.parametrize("size", [0, 1, 2])
def test_few_samples(size, fuse):
    fusion, skipping = pair(fuse)
    calls = calls_of(fusion)
    for levels in splits(4, size):
        x = inputs(levels)
        calls.clear()
        assert_agree(*(backward(f, [f], x) for f in (fusion, skipping)))
        assert {i for i, _ in calls} >= {*range(STAGES)}


@for_fuses
def test_forced_exits(fuse):
    fusion, skipping = pair(fuse)
    calls, orders = calls_of(fusion), set()
    for exit in (0, 1, 2, *(torch.randint(STAGES, (N,)) for _ in range(3))):
        x = inputs(torch.zeros(N))
        calls.clear()
        results = [
            backward(lambda *own, f=f, e=exit: f(*own, exit=e), [f], x) for f in (fusion, skipping)
        ]
        assert_agree(*results)
        orders.add(tuple(i for i, _ in calls))
    assert len(orders) == 1
    with pytest.raises(ValueError, match=r"exit must be in 0\.\.2; got 3"):
        fusion(*x, exit=torch.full((N,), 3))


@pytest.mark.parametrize("score", ["margin", "entropy", lambda x: x[:, 0] - x[:, 1]])
def test_scores(score):
    fusion, skipping = pair(score=score, threshold=[0.3, 0.5])
    for levels in splits(4):
        x = inputs(levels)
        torch.testing.assert_close(fusion(*x), skipping(*x))


@pytest.mark.parametrize("level", [0, 1])
def test_a_nan_score_names_its_row(level):
    fusion, skipping = pair("last")
    x = inputs(torch.zeros(N))
    x[level][4] = float("nan")
    for f in (fusion, skipping):
        with pytest.raises(ValueError, match=f"stage {level}'s score must not be nan.* row 4 "):
            f(*x)


def test_a_nan_of_who_has_left_is_not_seen():
    fusion, skipping = pair()
    levels = torch.tensor([0, 2, 1, 0])
    x = inputs(levels)
    x[1][1] = x[2][2] = float("nan")
    torch.testing.assert_close(fusion(*x), skipping(*x))
    assert fusion(*x).isfinite().all()


def test_lazy_inputs_are_fetched_for_who_comes():
    fusion, skipping = pair()
    x, y, z = inputs(torch.tensor([2, 0, 1, 0]))
    asked = []

    def fetch(rows):
        asked.append(rows.tolist())
        return z[rows]

    torch.testing.assert_close(fusion(x, y, Lazy(fetch)), skipping(x, y, z))
    assert asked == [[1, 3]]


def test_second_derivatives():
    fusion, skipping = pair("mean")
    x = [part.requires_grad_() for part in inputs(torch.tensor([2, 0, 1, 0]))]

    def twice(f):
        grads = torch.autograd.grad(f(*x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), x)

    torch.testing.assert_close(twice(fusion), twice(skipping))


def check(fusion, batches, call=lambda f, *x: f(*x), tolerance=1e-9, **compiling):
    """Each batch compiled as in eager routed execution, with gradients; one graph."""
    compiled = Counted(lambda *x: call(fusion, *x), **compiling)
    for x in batches:
        results = [backward(f, [fusion], x) for f in (compiled, lambda *x: call(fusion, *x))]
        assert_agree(*results, tolerance)
        with torch.no_grad():
            graphs = compiled.graphs
            torch.testing.assert_close(compiled(*x), call(fusion, *x), rtol=1e-6, atol=1e-6)
            extra = compiled.graphs - graphs  # the one without a graph of derivatives
    assert extra == 0
    assert compiled.graphs == 2


@for_fuses
def test_one_graph_for_every_split(fuse):
    check(cascade(fuse), map(inputs, splits(40)))


@for_fuses
def test_one_graph_for_every_forced_exit(fuse):
    fusion, exits = cascade(fuse), torch.zeros(N, dtype=torch.int64)

    def told(count):
        for levels in splits(count):
            exits.copy_(levels)
            yield inputs(torch.zeros(N))

    check(fusion, told(12), lambda f, *x: f(*x, exit=exits))


@pytest.mark.parametrize("exit", [0, 1, 2])
def test_one_forced_exit_for_all_in_a_graph(exit):
    check(cascade(), map(inputs, splits(3)), lambda f, *x: f(*x, exit=exit))


@pytest.mark.usefixtures("cpp_compiler")
def test_inductor():
    check(cascade(), map(inputs, splits(12)), tolerance=1e-6, backend="inductor")


def test_sizes_of_batches():
    fusion = cascade()
    compiled = Counted(fusion)
    with torch.no_grad():
        for size in (9, 5, 7, 30, 2, 3):
            (levels,) = splits(1, size)
            x = inputs(levels)
            torch.testing.assert_close(compiled(*x), fusion(*x))
    assert compiled.graphs <= 2


@pytest.mark.parametrize("starved", ["skip", "run"])
def test_training_with_its_loss_is_one_graph(starved):
    fusion = cascade(starved=starved).train()
    targets = torch.randint(3, (N,))

    def loss(*x):
        output, routing = fusion(*x, return_routing=True)
        weights = [0.5, 1.0, 2.0]
        return output.sum() + deep_supervision_loss(routing, targets, weights)

    compiled = Counted(loss)
    for levels in splits(4):
        x = inputs(levels)
        assert_agree(*(backward(f, [fusion], x) for f in (compiled, loss)))
    assert compiled.graphs == 1


@pytest.mark.parametrize("starved", ["skip", "run"])
def test_forced_exits_in_training_are_one_graph(starved):
    fusion = cascade(starved=starved).train()
    compiled = Counted(fusion)
    for exit in splits(5):
        x = inputs(torch.zeros(N))
        calls = (lambda *own, f=f, e=exit: f(*own, exit=e) for f in (compiled, fusion))
        assert_agree(*(backward(call, [fusion], x) for call in calls))
    assert compiled.graphs == 1


def test_what_was_decided_is_in_the_graph():
    fusion = cascade()

    def told(*x):
        output, routing = fusion(*x, return_routing=True)
        return output, routing.choice, routing.weights, routing.device_counts

    compiled = Counted(told)
    with torch.no_grad():
        for levels in splits(6):
            x = inputs(levels)
            torch.testing.assert_close(compiled(*x), told(*x))
    assert compiled.graphs == 1


@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_a_score_of_ones_own_in_a_graph(execution):
    fusion = cascade(score=lambda x: x[:, 0] - x[:, 1], threshold=0.5, execution=execution)
    compiled = Counted(fusion)
    with torch.no_grad():
        for levels in splits(6):
            x = inputs(levels)
            torch.testing.assert_close(compiled(*x), fusion(*x))
    assert compiled.graphs == 1


@pytest.mark.parametrize("forced", [False, True])
def test_faults_stop_the_graph(forced):
    fusion = cascade("last")
    compiled = Counted(fusion, "eager")
    exits = torch.zeros(N, dtype=torch.int64)
    x = inputs(torch.zeros(N))

    def call():
        return compiled(*x, exit=exits) if forced else compiled(*x)

    with torch.no_grad():
        call()
        exits[3] = STAGES
        x[1][3] = float("nan")
        with pytest.raises(RuntimeError, match="assertion"):
            call()


@pytest.mark.parametrize("strict", [False, True])
@for_fuses
def test_one_export_runs_every_batch(fuse, strict):
    fusion = cascade(fuse)
    size = Dim("size", min=2, max=64)
    shapes = (tuple({0: size} for _ in range(STAGES)),)
    with torch.no_grad():
        example = inputs(torch.arange(N) % 3)
        program = torch.export.export(fusion, example, dynamic_shapes=shapes, strict=strict)
        assert any("dynmm_kernels" in str(node.target) for node in program.graph.nodes)
        run = program.module()
        for rows in (2, 3, 5, 17, 33):
            for levels in splits(4, rows):
                x = inputs(levels)
                torch.testing.assert_close(run(*x), fusion(*x))


def test_exports_for_onnx_are_masked(monkeypatch):
    fusion, x = cascade(), inputs(torch.arange(N) % 3)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ValueError, match="routed execution has no operators in ONNX; set execu"):
        torch.export.export(fusion, x)
    fusion.execution = "auto"
    program = torch.export.export(fusion, x)
    assert not any("dynmm_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*x), fusion(*x))


def test_tensors_without_data_do_not_route():
    fusion = cascade().to("meta")
    x = [part.to("meta") for part in inputs(torch.zeros(N))]
    with pytest.raises(ValueError, match="without data cannot tell; set execution='masked'"):
        fusion(*x)
    fusion.execution = "auto"
    assert fusion(*x).shape == (N, 3)


def test_a_wrong_setting():
    with pytest.raises(ValueError, match="starved must be one of 'skip', 'run'; got 'no'"):
        cascade(starved="no")
