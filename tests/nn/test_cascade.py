"""CascadeFusion against a loop over samples, and what each of its stages is given."""

import copy
import doctest
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import FEATURES, Calls, Function, assert_close, assert_same, backward, mlp
from torch import Tensor, nn

from dynmm_kernels import Branch, CascadeFusion, Lazy, Shared, deep_supervision_loss, resource_loss
from dynmm_kernels.functional import plan
from dynmm_kernels.nn import CascadeRouting, Usage
from dynmm_kernels.nn.cascade import fusion

N, CLASSES, STAGES = 24, 4, 3
NAN, INF = float("nan"), float("inf")


# The oracle: one sample at a time, in plain PyTorch


def probability(x: Tensor) -> Tensor:
    return x.exp().max() / x.exp().sum()


def margin(x: Tensor) -> Tensor:
    probs = sorted((x.exp() / x.exp().sum()).unbind())
    return probs[-1] - probs[-2]


def entropy(x: Tensor) -> Tensor:
    probs = x.exp() / x.exp().sum()
    return 1 + sum(p * p.log() for p in probs) / math.log(len(x))


def energy(x: Tensor) -> Tensor:
    return x.exp().sum().log()


class Weigh(nn.Module):
    """A fuse with a weight for each stage."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))

    def forward(self, logits: list[Tensor]) -> Tensor:
        return sum(w * x for w, x in zip(self.weights, logits, strict=False))


SCORES = {
    "probability": ("probability", probability),
    "margin": ("margin", margin),
    "entropy": ("entropy", entropy),
    "energy": ("energy", energy),
    "callable": (lambda x: x[:, 0] - x[:, 1], lambda x: x[0] - x[1]),
}
FUSES = {
    "energy": (lambda: "energy", lambda xs: sum(0.1 * energy(x) * x for x in xs)),
    "mean": (lambda: "mean", lambda xs: sum(xs) / len(xs)),
    "last": (lambda: "last", lambda xs: xs[-1]),
    "module": (Weigh, None),
}


def loop(stages, selects, fuse, score, thresholds):
    """A cascade as a call; `call.exits` is where the samples of the last one left."""

    def call(*inputs):
        first = inputs[0]
        size = len(next(iter(first.values())) if isinstance(first, dict) else first)
        outputs, call.exits = [], []
        for n in range(size):
            row = [
                {k: v[n : n + 1] for k, v in x.items()} if isinstance(x, dict) else x[n : n + 1]
                for x in inputs
            ]
            logits = []
            for s, (stage, select) in enumerate(zip(stages, selects, strict=True)):
                logits.append(stage(*select(*row))[0])
                fused = fuse(logits)
                if s == len(stages) - 1 or score(fused) >= thresholds[s]:
                    break
            outputs.append(fused)
            call.exits.append(s)
        return torch.stack(outputs)

    return call


def between(scores: list[float]) -> float:
    """A threshold that half of the scores reach, none of them narrowly."""
    ordered = sorted(scores)
    return (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2


def thresholds_for(stages, selects, fuse, score, inputs) -> list[float]:
    """Thresholds at which half of those who come to a stage leave."""
    thresholds = []
    for s in range(len(stages) - 1):
        stop = loop(stages[: s + 1], selects[: s + 1], fuse, score, thresholds)
        with torch.no_grad():
            fused = stop(*inputs)
        came = [float(score(x)) for x, e in zip(fused, stop.exits, strict=True) if e == s]
        thresholds.append(between(came))
    return thresholds


def samples(n: int = N, dtype=torch.float64) -> Tensor:
    return torch.randn(n, FEATURES, dtype=dtype)


def networks(count: int = STAGES) -> list[nn.Module]:
    return [mlp(CLASSES) for _ in range(count)]


def positions(s: int):
    return lambda *x: (x[s],)


READS = {
    "positions": ([[0], [1], [2]], [positions(s) for s in range(STAGES)]),
    "keys": ([["a"], ["b"], ["c"]], [lambda x, k=k: (x[k],) for k in "abc"]),
    "a callable": ([lambda x, y, z, s=s: (x, y, z)[s] for s in range(STAGES)],) * 2,
}
READS["a callable"] = (READS["a callable"][0], [positions(s) for s in range(STAGES)])


def three_inputs(reads: str = "positions") -> tuple:
    parts = [samples() for _ in range(STAGES)]
    return (dict(zip("abc", parts, strict=True)),) if reads == "keys" else tuple(parts)


def cascade_of(stages, reads="positions", **options) -> CascadeFusion:
    inputs = READS[reads][0]
    named = [Branch(m, inputs=i, cost=c) for m, i, c in zip(stages, inputs, (1, 2, 4), strict=True)]
    return CascadeFusion(named, **options).eval()


@pytest.mark.parametrize("execution", ["routed", "masked", "auto"])
@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("score", SCORES)
def test_values_and_gradients(score, fuse, execution, backend):
    (named, by_hand), (make, sum_up) = SCORES[score], FUSES[fuse]
    stages, inputs, selects = networks(), three_inputs(), READS["positions"][1]
    fuse = make()
    sum_up = sum_up or fuse
    modules = [*stages, fuse] if isinstance(fuse, nn.Module) else stages
    thresholds = thresholds_for(stages, selects, sum_up, by_hand, inputs)
    oracle = loop(stages, selects, sum_up, by_hand, thresholds)
    cascade = cascade_of(stages, score=named, threshold=thresholds, fuse=fuse, execution=execution)
    expected = backward(oracle, modules, inputs)
    assert sorted({*oracle.exits}) == [0, 1, 2]
    assert_same(backward(cascade, modules, inputs), expected)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output, routing = cascade(*inputs, return_routing=True)
        assert_close(output, expected.output)
        assert routing.choice.tolist() == oracle.exits


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_how_stages_read(reads, execution):
    stages, inputs, selects = networks(), three_inputs(reads), READS[reads][1]
    sum_up = FUSES["mean"][1]
    thresholds = thresholds_for(stages, selects, sum_up, probability, inputs)
    cascade = cascade_of(stages, reads, threshold=thresholds, fuse="mean", execution=execution)
    oracle = loop(stages, selects, sum_up, probability, thresholds)
    assert_same(backward(cascade, stages, inputs), backward(oracle, stages, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fuse", ["energy", "mean", "last"])
def test_lower_precision_is_routed_as_it_is_masked(fuse, dtype):
    cascade = CascadeFusion([nn.Linear(FEATURES, CLASSES) for _ in range(3)], fuse=fuse).to(dtype)
    cascade.eval().threshold = 0.45 if fuse != "energy" else 0.3
    x = samples(40).to(dtype)
    results = []
    for execution in ("masked", "routed"):
        cascade.execution = execution
        with torch.no_grad():
            results.append(cascade(x, return_routing=True))
    (masked, one), (routed, other) = results
    assert torch.equal(one.choice, other.choice)
    assert 0 < other.counts[0] < 40
    assert routed.dtype is dtype
    tolerance = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(routed, masked, rtol=tolerance, atol=tolerance)


# Who runs what


class Told(nn.Module):
    """Confident, by 9, of the rows whose first number is at least `level`."""

    def __init__(self, level: float):
        super().__init__()
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        sure = 9 * (x[:, :1] >= self.level).to(x.dtype)
        return torch.cat([sure + x[:, 1:2] * 1e-3, x[:, 1:3] * 1e-3], 1)


def told(**options) -> CascadeFusion:
    """Samples whose first number is 2 leave first, those of 1 second, those of 0 at the end."""
    stages = [Branch(Told(2), cost=1), Branch(Told(1), cost=3), Branch(Told(0), cost=10)]
    return CascadeFusion(stages, fuse="last", **options).eval()


def planned(levels: list[int]) -> Tensor:
    x = torch.randn(len(levels), 3, dtype=torch.float64)
    x[:, 0] = torch.tensor(levels)
    return x


SPLITS = {
    "mixed": [2, 0, 1, 1, 0, 2, 2, 0],
    "nobody leaves": [0, 0, 0],
    "all leave first": [2, 2, 2, 2],
    "all leave second": [1, 1, 1],
    "nobody leaves second": [0, 2, 0, 2],
    "nobody leaves first": [1, 0, 0, 1],
    "one sample, first": [2],
    "one sample, last": [0],
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("forced", [False, True])
def test_each_stage_runs_exactly_the_survivors(split, forced, call):
    cascade, x = told(), planned(split)
    exits = [2 - level for level in split]
    calls = Calls.of([stage.module for stage in cascade.stages])
    with torch.no_grad():
        output, routing = cascade(
            x, exit=torch.tensor(exits) if forced else None, return_routing=True
        )
    for s in range(STAGES):
        came = [n for n, e in enumerate(exits) if e >= s]
        seen = [arguments[0] for arguments in calls.arguments[s]]
        assert len(seen) == bool(came)
        assert not came or torch.equal(seen[0], x[came])
        assert not came or len(came) < len(x) or seen[0] is x  # no gather
    expected = torch.cat([cascade.stages[e].module(x[n : n + 1]) for n, e in enumerate(exits)])
    assert torch.equal(output, expected)
    rows = tuple(sum(e >= s for e in exits) for s in range(STAGES))
    assert routing.rows_run == rows
    assert routing.choice.dtype is torch.int64
    assert routing.choice.tolist() == exits
    assert routing.counts == tuple(exits.count(s) for s in range(STAGES))
    assert routing.device_counts.tolist() == list(routing.counts)
    assert routing.fractions == tuple(c / len(x) for c in routing.counts)
    assert routing.executed_cost == pytest.approx(
        sum(r * c for r, c in zip(rows, (1, 3, 10), strict=True)) / len(x)
    )
    assert routing.exits is None
    assert routing.probs is None
    assert routing.expected_cost is None


@pytest.mark.parametrize("exit", [0, 1, 2])
def test_one_forced_exit_for_all(exit):
    cascade, x = cascade_of(networks(), threshold=0.0), three_inputs()
    calls = Calls.of([stage.module for stage in cascade.stages])
    output, routing = cascade(*x, exit=exit, return_routing=True)
    assert calls.total() == [N if s <= exit else 0 for s in range(STAGES)]
    assert routing.counts == tuple(N if s == exit else 0 for s in range(STAGES))
    fused = [s.module(x[i]) for i, s in enumerate([*cascade.stages][: exit + 1])]
    assert_close(output, sum(0.1 * y.logsumexp(1, True) * y for y in fused))


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_forced_exits_have_the_gradients_of_the_loop(fuse, execution, dtype):
    make, sum_up = FUSES[fuse]
    stages, inputs, fuse = networks(), three_inputs(), make()
    modules = [*stages, fuse] if isinstance(fuse, nn.Module) else stages
    exits = torch.randint(0, STAGES, (N,), dtype=dtype)

    def oracle(*x):
        outputs = []
        for n, e in enumerate(exits.tolist()):
            so_far = [stages[s](x[s][n : n + 1])[0] for s in range(e + 1)]
            outputs.append((sum_up or fuse)(so_far))
        return torch.stack(outputs)

    cascade = cascade_of(stages, fuse=fuse, execution=execution)
    actual = backward(lambda *x: cascade(*x, exit=exits), modules, inputs)
    assert_same(actual, backward(oracle, modules, inputs))


def test_lazy_inputs_are_fetched_for_who_comes():
    stores = [samples() for _ in range(STAGES)]
    fetched: list = [[] for _ in stores]

    def lazy(s):
        def fetch(rows):
            assert rows.dtype is torch.int64
            fetched[s].append(rows.tolist())
            return stores[s][rows]

        return Lazy(fetch)

    cascade = cascade_of(networks(), threshold=[0.4, 0.4], fuse="last")
    with torch.no_grad():
        expected, routing = cascade(*stores, return_routing=True)
        output = cascade(stores[0], lazy(1), lazy(2))
        assert torch.equal(output, expected)
        exits = routing.choice.tolist()
        assert 0 < routing.counts[0] < N
        assert 0 < routing.counts[2] < N
        for s in (1, 2):
            assert fetched[s] == [[n for n, e in enumerate(exits) if e >= s]]
        cascade(lazy(0), lazy(1), lazy(2), exit=torch.tensor([1, 0, 2]))
    assert fetched[0] == [[0, 1, 2]]
    assert [rows[-1] for rows in fetched[1:]] == [[0, 2], [2]]


def test_shared_inputs_are_not_gathered():
    table, seen = torch.ones(7), []

    def stage(x, shared):
        seen.append(shared)
        return x[:, :CLASSES]

    with torch.no_grad():
        CascadeFusion([Function(stage)] * 2).eval()(
            samples(), Shared(table), exit=torch.arange(N) % 2
        )
    assert all(shared is table for shared in seen)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("fuse", ["energy", "mean", "last"])
def test_poison_in_rows_that_left(poison, fuse):
    """A modality that is missing where nobody needs it: neither output nor gradients see it."""
    exits = torch.tensor([0, 2, 1, 0, 2, 1])
    x = [samples(6).requires_grad_() for _ in range(STAGES)]
    with torch.no_grad():
        for s in range(1, STAGES):
            x[s][exits < s] = poison
    cascade = cascade_of(networks(), fuse=fuse)
    output = cascade(*x, exit=exits)
    output.square().sum().backward()
    assert output.isfinite().all()
    gradients = [*(p.grad for p in cascade.parameters()), *(part.grad for part in x)]
    assert all(grad.isfinite().all() for grad in gradients)


def test_masked_scores_of_those_who_left_do_not_count():
    x = planned([2, 0])
    cascade = told(execution="masked")
    cascade.stages[1] = Function(lambda x: Told(1)(x).where(x[:, :1] < 2, NAN))
    with torch.no_grad():
        assert cascade(x).isfinite().all()


@pytest.mark.parametrize("grad", [False, True])
def test_the_output_is_nobody_elses(grad):
    """Identity stages, where nothing was moved: who writes there writes nowhere else."""
    table = nn.Module()
    table.register_buffer("rows", samples(3))
    table.forward = lambda x: table.rows
    for stages in ([nn.Identity(), nn.Identity()], [table, nn.Identity()]):
        cascade, x = CascadeFusion(stages, fuse="last").eval(), samples(3).requires_grad_(grad)
        before, rows = x.detach().clone(), table.rows.clone()
        for exit in (0, 1):
            output = cascade(x, exit=exit)
            output.detach().zero_()
            output += 1
        assert torch.equal(x, before)
        assert torch.equal(table.rows, rows)


def test_the_output_is_none_of_the_exits():
    cascade = CascadeFusion([nn.Identity(), nn.Identity()], fuse="last")
    with torch.no_grad():
        output, routing = cascade(samples(3), return_routing=True)
    output.zero_()
    assert routing.exits[-1].abs().min() > 0


@pytest.mark.parametrize("exit", [0, 1, torch.arange(N) % 2])
def test_stages_in_place(exit):
    def stage():
        return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(FEATURES, CLASSES).double())

    stages, x = [stage(), stage()], samples()
    before = x.clone()
    cascade = CascadeFusion(stages, fuse="last").eval()
    output = cascade(x, exit=exit)
    assert torch.equal(x, before)
    both = torch.stack([part[1](x.relu()) for part in stages])
    assert_close(output, both[torch.as_tensor(exit).expand(N), torch.arange(N)])


def test_a_stage_that_writes_where_others_read():
    cascade = CascadeFusion({"rude": Function(lambda x: x.mul_(2)), "b": nn.Identity()}).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=r"rude.*must not write"):
        cascade(samples())


def test_hooks_of_stages_run():
    cascade, x, seen = told(), planned([2, 0, 1]), []
    for stage in cascade.stages:
        stage.register_forward_hook(lambda m, args, out: seen.append((m.name, len(args[-1]))))
    with torch.no_grad():
        cascade(x)
    assert seen == [("0", 3), ("1", 2), ("2", 1)]


def test_stages_that_nobody_came_to_get_zeros_as_when_masked():
    stages, inputs = networks(), three_inputs()
    cascade, results = cascade_of(stages, threshold=-INF), []
    for cascade.execution in ("masked", "routed"):
        results.append(backward(cascade, stages, inputs))
    assert_same(results[1], results[0])
    assert results[1].inputs[1].eq(0).all()


def test_usage_adds_up():
    usage, cascade = Usage(), told()
    with torch.no_grad():
        for split in SPLITS.values():
            usage.add(cascade(planned(split), return_routing=True)[1])
    flat = [2 - level for split in SPLITS.values() for level in split]
    report = usage.read()
    assert report.counts == tuple(flat.count(s) for s in range(STAGES))
    assert report.executed_cost == pytest.approx(sum((1, 4, 14)[e] for e in flat) / len(flat))


def test_resource_loss_is_the_cost_of_the_stages_run():
    with torch.no_grad():
        routing = told()(planned([2, 0, 1, 2]), return_routing=True)[1]
    assert float(resource_loss(routing)) == pytest.approx(routing.executed_cost)


@pytest.fixture
def waits(monkeypatch) -> list[int]:
    """One entry per wait for a plan's counts, which stand in for the copy from a GPU."""
    waited: list[int] = []

    def host_copy(header):
        return lambda: (waited.append(1), header.tolist())[1]

    monkeypatch.setattr(plan, "host_copy", host_copy)
    return waited


def test_one_wait_per_stage_that_somebody_came_to(waits):
    x = planned(SPLITS["mixed"])
    with torch.no_grad():
        for levels, count in ((SPLITS["mixed"], 2), ([2, 2], 1), ([0, 1], 2)):
            _, routing = told()(planned(levels), return_routing=True)
            Usage().add(routing)
            assert sum(routing.counts) == len(levels)
            assert len(waits) == count
            waits.clear()
        told()(x, exit=torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))
        assert len(waits) == 1
        waits.clear()
    told().train()(x, return_routing=True)
    assert not waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_on_a_gpu():
    cascade, x = cascade_of(networks(), threshold=0.4, fuse="mean"), three_inputs()
    exits = torch.arange(N) % STAGES
    with torch.no_grad():
        expected = cascade(*x), cascade(*x, exit=exits)
        cascade.cuda()
        moved, exits = [part.cuda() for part in x], exits.cuda()
        cascade(*moved)
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = cascade(*moved), cascade(*moved, exit=exits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_close([part.cpu() for part in actual], [*expected])


# Training


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 2.0]])
@pytest.mark.parametrize("labels", ["classes", "several"])
def test_training_runs_all_and_deep_supervision_is_the_sum(fuse, weights, labels):
    make, sum_up = FUSES[fuse]
    stages, inputs, fuse = networks(), three_inputs(), make()
    modules = [*stages, fuse] if isinstance(fuse, nn.Module) else stages
    classes = torch.randint(0, CLASSES, (N,))
    several = torch.rand(N, CLASSES, dtype=torch.float64)
    cascade = cascade_of(stages, fuse=fuse, threshold=-INF).train()

    def loss(*x):
        output, routing = cascade(*x, return_routing=True)
        assert torch.equal(output, routing.exits[-1])
        assert routing.rows_run == (N,) * STAGES
        assert routing.counts == (0, 0, N)
        assert routing.choice.tolist() == [2] * N
        targets = classes if labels == "classes" else several
        return deep_supervision_loss(routing, targets, weights)

    def by_hand(*x):
        total = torch.zeros((), dtype=torch.float64)
        for n in range(N):
            logits = [stage(part[n : n + 1])[0] for stage, part in zip(stages, x, strict=True)]
            for s in range(STAGES):
                fused = (sum_up or fuse)(logits[: s + 1])
                if labels == "classes":
                    own = fused.exp().sum().log() - fused[classes[n]]
                else:
                    p = fused.sigmoid()
                    own = -(several[n] * p.log() + (1 - several[n]) * (1 - p).log()).mean()
                total = total + (1 if weights is None else weights[s]) * own / N
        return total

    assert_same(backward(loss, modules, inputs), backward(by_hand, modules, inputs))


def test_forced_exits_in_training():
    stages, inputs = networks(), three_inputs()
    exits = torch.arange(N) % STAGES
    cascade = cascade_of(stages, fuse="mean")
    expected = cascade(*inputs, exit=exits)
    output, routing = cascade.train()(*inputs, exit=exits, return_routing=True)
    assert_close(output, expected)
    assert routing.rows_run == (N,) * STAGES
    assert routing.choice.tolist() == exits.tolist()
    assert len(routing.exits) == STAGES


def test_training_without_a_routing_is_the_whole_fusion():
    cascade, inputs = cascade_of(networks(), threshold=-INF), three_inputs()
    assert_close(cascade.train()(*inputs), cascade.eval()(*inputs, exit=STAGES - 1))


def test_half_precision_losses_are_taken_in_single():
    cascade = CascadeFusion([nn.Linear(FEATURES, CLASSES)] * 2).half()
    routing = cascade(samples().half(), return_routing=True)[1]
    loss = deep_supervision_loss(routing, torch.zeros(N, dtype=torch.int64))
    assert loss.dtype is torch.float32


def test_run_all_gives_what_the_forward_pass_decides_by():
    stages, inputs = networks(), three_inputs()
    cascade = cascade_of(stages, fuse="mean", threshold=[0.4, 0.5])
    with torch.no_grad():
        scores, exits = cascade._run_all(*inputs)
        output, routing = cascade(*inputs, return_routing=True)
    assert scores.shape == (N, STAGES - 1)
    stays = torch.stack([scores[:, 0] < 0.4, scores[:, 1] < 0.5], 1)
    exit = stays.long().cumprod(1).sum(1)
    assert torch.equal(exit, routing.choice)
    assert_close(torch.stack(exits)[exit, torch.arange(N)], output)


# Empty batches, nan, settings


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("score", ["probability", "margin", "entropy", "energy"])
@pytest.mark.parametrize("fuse", FUSES)
def test_an_empty_batch(execution, score, fuse, call):
    fuse = FUSES[fuse][0]()
    cascade = CascadeFusion(networks(), score=score, fuse=fuse, execution=execution)
    x = samples(0)
    for options in ({}, {"exit": 1}, {"exit": torch.zeros(0, dtype=torch.int64)}):
        output, routing = call(cascade, x, return_routing=True, **options)
        assert output.shape == (0, CLASSES)
        assert output.dtype is torch.float64
        assert routing.counts == routing.rows_run == (0, 0, 0)
        assert routing.fractions == (0, 0, 0)
    if output.requires_grad:
        targets = torch.zeros(0, dtype=torch.int64)
        (output.sum() + deep_supervision_loss(routing, targets)).backward()
        assert all(p.grad.eq(0).all() for p in cascade.parameters())


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("level", [0, 1])
def test_a_nan_score_names_its_row(execution, level):
    x = planned([2, 0, 1, 0])
    x[3, 1] = NAN if level == 0 else 0
    cascade = told(execution=execution)
    if level == 1:
        cascade.stages[1] = Function(lambda x: Told(1)(x).where(x[:, 1:2] != 0, NAN))
    where = f"stage {level}" if execution == "routed" else "the cascade"
    with (
        torch.no_grad(),
        pytest.raises(
            ValueError, match=rf"{where}'s score must not be nan; got .*nan.* in row 3 \(1 such"
        ),
    ):
        cascade(x)
    x[3, 1] = 1
    with torch.no_grad():
        assert cascade(x).isfinite().all()


def test_nan_of_the_last_stage_and_of_forced_exits_is_not_hidden():
    x = planned([2, 0, 0])
    x[1, 1] = NAN
    with torch.no_grad():
        output = told()(x, exit=torch.tensor([0, 2, 2]))
    assert output.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_infinite_thresholds(execution):
    cascade, x = told(execution=execution), planned(SPLITS["mixed"])
    with torch.no_grad():
        for threshold, counts in ((INF, (0, 0, 8)), (-INF, (8, 0, 0)), ([INF, -INF], (0, 8, 0))):
            cascade.threshold = threshold
            assert cascade(x, return_routing=True)[1].counts == counts


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("threshold", [1.0, 1, [1.0], (1,), torch.tensor([1.0])])
def test_a_score_at_the_threshold_leaves(threshold, execution):
    cascade = CascadeFusion(
        [nn.Identity()] * 2, score=lambda x: x[:, 0], threshold=threshold, fuse="last"
    ).eval()
    cascade.execution = execution
    with torch.no_grad():
        routing = cascade(torch.tensor([[1.0, 0], [0.999, 0]]), return_routing=True)[1]
    assert routing.choice.tolist() == [0, 1]
    assert cascade.thresholds == (1.0,)


def test_settings_may_change():
    cascade, x = cascade_of(networks()), three_inputs()
    weigh = Weigh()
    for fuse in ("mean", weigh, "last", weigh, nn.Module()):
        cascade.fuse = fuse
        assert ("fuse.module.weights" in cascade.state_dict()) == (fuse is weigh)
    cascade.fuse = "mean"
    cascade.score = mlp(1, CLASSES)
    assert any(name.startswith("score.") for name in cascade.state_dict())
    cascade.score = "margin"
    assert not any(name.startswith("score.") for name in cascade.state_dict())
    for copied in (copy.deepcopy(cascade), pickle.loads(pickle.dumps(cascade))):
        with torch.no_grad():
            assert torch.equal(copied(*x), cascade(*x))
    assert "score='margin'" in repr(cascade)


def test_a_score_with_parameters_gets_no_gradient():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(CLASSES, 1).double()

        def forward(self, logits):
            return self.linear(logits)[:, 0]

    cascade = cascade_of(networks(), score=Learned(), threshold=0.0)
    cascade(*three_inputs()).sum().backward()
    assert all(p.grad is None for p in cascade.score.parameters())


@pytest.mark.parametrize("fuse", ["energy", "mean", "last"])
def test_derivatives_of_second_order_and_forward(fuse):
    cascade = cascade_of(networks(), fuse=fuse)
    x = [samples(6).requires_grad_() for _ in range(STAGES)]

    def call(*x):
        return cascade(*x, exit=torch.arange(6) % STAGES)

    assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, x)


def test_compiled():
    cascade = CascadeFusion(networks(), threshold=0.4, fuse="mean").eval()
    compiled = torch.compile(cascade, backend="eager")
    with torch.no_grad():
        for n in (20, 13, 7):
            x = samples(n)
            assert_close(compiled(x), cascade(x))


def test_more_stages_than_one_call_fuses():
    cascade = CascadeFusion([nn.Identity()] * 10, threshold=INF).eval()
    x = samples(5)
    with torch.no_grad():
        assert_close(cascade(x), 10 * 0.1 * x.logsumexp(1, True) * x)


def test_a_store_behind_lazy_is_copied_for_stages_in_place():
    stages = [Branch(nn.Identity(), inputs=[0]), Branch(nn.ReLU(inplace=True), inputs=[1])]
    cascade, store = CascadeFusion(stages, fuse="last").eval(), -samples(2)
    before = store.clone()
    with torch.no_grad():
        cascade(samples(4), Lazy(lambda rows: store), exit=torch.tensor([0, 1, 0, 1]))
    assert torch.equal(store, before)


def test_scores_of_half_precision_are_taken_in_single():
    cascade = CascadeFusion([nn.Identity(), nn.Identity()], fuse="last").eval()
    x = samples().half()
    with torch.no_grad():
        for cascade.score in ("probability", "margin", "entropy", "energy"):
            (actual, _), (expected, _) = cascade._run_all(x), cascade._run_all(x.double())
            assert actual.dtype is torch.float32
            torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fuse", ["energy", "mean", "last"])
def test_autocast_may_end_in_different_dtypes(fuse):
    stages = [nn.Linear(FEATURES, CLASSES), Function(lambda x: x[:, :CLASSES])]
    cascade, x, results = CascadeFusion(stages, fuse=fuse).eval(), samples().float(), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for cascade.execution in ("masked", "routed"):
            results.append(cascade(x, exit=torch.arange(N) % 2))
    assert results[0].dtype is results[1].dtype is torch.float32
    torch.testing.assert_close(*results, rtol=0.01, atol=0.01)


def test_the_example_of_the_docstring():
    assert doctest.testmod(fusion).attempted
    assert not doctest.testmod(fusion).failed


# Bad input


def test_fewer_than_two_stages():
    for stages in ([], [mlp()], {"a": mlp()}):
        with pytest.raises(ValueError, match=rf"at least two stages; got {len(stages)}"):
            CascadeFusion(stages)
    with pytest.raises(TypeError, match=r"stages must be a sequence.*int"):
        CascadeFusion(3)
    with pytest.raises(ValueError, match=r"names must differ.*twin"):
        CascadeFusion([Branch(mlp(), name="twin"), Branch(mlp(), name="twin")])


BAD_SETTINGS = [
    ("threshold", NAN, ValueError, "threshold must not be nan"),
    ("threshold", [0.5, NAN], ValueError, "threshold must not be nan"),
    ("threshold", [0.5], ValueError, "one number, or 2.*got 1"),
    ("threshold", [0.5] * 3, ValueError, "one number, or 2.*got 3"),
    ("threshold", [], ValueError, "one number, or 2.*got 0"),
    ("threshold", "high", TypeError, "threshold must be a number.*'high'"),
    ("threshold", True, TypeError, "threshold must be a number.*True"),
    ("threshold", None, TypeError, "threshold must be a number.*None"),
    ("threshold", torch.zeros(2, 1), TypeError, "threshold must be a number"),
    ("score", "maximum", ValueError, "score must be one of.*'margin'.*got 'maximum'"),
    ("score", 3, TypeError, "score must be one of.*got int"),
    ("fuse", "sum", ValueError, "fuse must be one of.*'mean'.*got 'sum'"),
    ("fuse", 3, TypeError, "fuse must be one of.*module.*got int"),
    ("execution", "dense", ValueError, "execution must be one of.*'masked'.*got 'dense'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_SETTINGS)
def test_bad_settings(name, value, error, message):
    with pytest.raises(error, match=message):
        CascadeFusion(networks(), **{name: value})
    cascade = CascadeFusion(networks())
    before = getattr(cascade, name)
    with pytest.raises(error, match=message):
        setattr(cascade, name, value)
    assert getattr(cascade, name) == before


BAD_SCORES = {
    "a column": (lambda x: x[:, :1], ValueError, r"score must return one number.*\[6\].*\[6, 1\]"),
    "too few": (lambda x: x[1:, 0], ValueError, r"score must return.*\[6\].*\[5\]"),
    "a scalar": (lambda x: x.sum(), ValueError, r"score must return.*\[6\].*\[\]"),
    "integers": (lambda x: x.argmax(1), TypeError, r"score must return a floating.*int64"),
    "bools": (lambda x: x[:, 0] > 0, TypeError, r"score must return a floating.*bool"),
    "a list": (lambda x: x[:, 0].tolist(), TypeError, r"score must return a floating.*list"),
    "writes": (lambda x: x.mul_(2)[:, 0], ValueError, r"score must not write"),
}
for_executions = pytest.mark.parametrize("execution", ["routed", "masked"])


@for_executions
@pytest.mark.parametrize(("score", "error", "message"), BAD_SCORES.values(), ids=BAD_SCORES)
def test_bad_scores(score, error, message, execution):
    cascade = CascadeFusion(networks(), score=score, execution=execution).eval()
    with torch.no_grad(), pytest.raises(error, match=message):
        cascade(samples(6))


@for_executions
@pytest.mark.parametrize("score", ["probability", "margin", "entropy"])
def test_one_class_has_no_rival(score, execution):
    cascade = CascadeFusion([mlp(1), mlp(1)], score=score, execution=execution).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=rf"score='{score}'.*\[6, 1\]"):
        cascade(samples(6))
    cascade.score = "energy"
    with torch.no_grad():
        assert cascade(samples(6)).shape == (6, 1)


ODD_STAGES = {
    "classes": (lambda x: x[:, :3], ValueError, r"odd.*\[\d, 4\], as stage 'plain'.*\[\d, 3\]"),
    "rows": (lambda x: x[1:, :4], ValueError, r"odd.*logits of shape \[(\d), 4\]"),
    "dimensions": (lambda x: x[:, :4, None], ValueError, r"odd.*\[\d, 4\].*\[\d, 4, 1\]"),
    "one dimension": (lambda x: x[:, 0], ValueError, r"odd.*\[\d, 4\].*got \[\d\]"),
    "integers": (lambda x: x[:, :4].long(), TypeError, r"odd.*floating.*int64"),
    "dtype": (lambda x: x[:, :4].float(), TypeError, r"odd.*float32.*plain.*float64"),
    "None": (lambda x: None, TypeError, r"odd.*floating logits.*NoneType"),
    "a dict": (lambda x: {"logits": x}, TypeError, r"odd.*floating logits.*dict"),
    "sparse": (lambda x: x[:, :4].to_sparse(), TypeError, r"odd.*strided"),
    "device": (lambda x: x[:, :4].to("meta"), ValueError, r"odd.*on cpu.*meta"),
}


@pytest.mark.parametrize("exit", [None, torch.tensor([0, 1, 1, 0, 1, 1])])
@pytest.mark.parametrize(("odd", "error", "message"), ODD_STAGES.values(), ids=ODD_STAGES)
def test_stages_that_do_not_fit(odd, error, message, exit, call):
    stages = {"plain": Function(lambda x: x[:, :4]), "odd": Function(odd)}
    with pytest.raises(error, match=message):
        call(CascadeFusion(stages, threshold=INF), samples(6), exit=exit)


def test_a_first_stage_that_returns_no_logits(call):
    for odd in (lambda x: x[:, 0], lambda x: x[1:], lambda x: x[:, :0]):
        with pytest.raises(ValueError, match=r"stage 0 must return logits of shape \[6, C\]"):
            call(CascadeFusion([Function(odd), mlp()]), samples(6))


BAD_FUSES = {
    "a class more": (lambda xs: F.pad(xs[0], (0, 1)), ValueError, r"fuse must return.*\[6, 5\]"),
    "rows": (lambda xs: xs[0][1:], ValueError, r"fuse must return.*\[6, 4\].*\[5, 4\]"),
    "the list": (lambda xs: xs, TypeError, r"fuse must return floating logits.*list"),
    "integers": (lambda xs: xs[0].long(), TypeError, r"fuse must return floating logits.*int64"),
    "writes": (lambda xs: xs[0].mul_(2), ValueError, r"fuse must not write"),
}


@pytest.mark.parametrize(("fuse", "error", "message"), BAD_FUSES.values(), ids=BAD_FUSES)
def test_bad_fuses(fuse, error, message):
    for train in (True, False):
        cascade = CascadeFusion(networks(), fuse=Function(fuse)).train(train)
        with torch.no_grad(), pytest.raises(error, match=message):
            cascade(samples(6))


def test_exceptions_name_the_stage_the_fuse_and_the_score():
    def fail(*_):
        raise KeyError("missing")

    plain = [Function(lambda x: x), Function(lambda x: x)]
    cascades = {
        "stage 1": CascadeFusion([plain[0], Function(fail)], threshold=INF),
        "fuse": CascadeFusion(plain, fuse=Function(fail)),
        "score": CascadeFusion(plain, score=fail),
    }
    for where, cascade in cascades.items():
        with torch.no_grad(), pytest.raises(KeyError, match="missing") as caught:
            cascade.eval()(samples())
        assert f"in {where}" in caught.value.__notes__


BAD_EXITS = [
    (STAGES, ValueError, r"exit must be in 0\.\.2.*got 3"),
    (-1, ValueError, r"exit must be in 0\.\.2.*got -1"),
    (True, TypeError, r"exit must be an int or a LongTensor \[N\]; got True"),
    ("random", TypeError, r"exit must be an int or a LongTensor \[N\]; got 'random'"),
    (1.0, TypeError, r"exit must be an int or a LongTensor \[N\]; got 1\.0"),
    (torch.zeros(6), TypeError, r"exit must be.*float32"),
    (torch.zeros(6, dtype=torch.bool), TypeError, r"exit must be.*bool"),
    (torch.zeros(5, dtype=torch.int64), ValueError, r"exit must have shape \[6\]; got \[5\]"),
    (torch.zeros(6, 1, dtype=torch.int64), ValueError, r"exit must have shape \[6\].*\[6, 1\]"),
    (torch.tensor([0, 1, 3, 0, 1, 9]), ValueError, r"exit must be in 0\.\.2; got 3 in row 2 \(2"),
    (torch.tensor([0, 1, 2, -1, 1, 0]), ValueError, r"exit must be in 0\.\.2; got -1 in row 3"),
    (torch.zeros(6, device="meta").long(), ValueError, r"exit must be on cpu.*meta"),
]


@pytest.mark.parametrize(("exit", "error", "message"), BAD_EXITS)
def test_bad_exits(exit, error, message, call):
    with pytest.raises(error, match=message):
        call(CascadeFusion(networks()), samples(6), exit=exit)


def routing_of(train: bool = True) -> CascadeRouting:
    with torch.no_grad():
        cascade = CascadeFusion(networks()).train(train)
        return cascade(samples(6), exit=None if train else 0, return_routing=True)[1]


CLASS_TARGETS = torch.zeros(6, dtype=torch.int64)
BAD_TARGETS = [
    (CLASS_TARGETS[1:], ValueError, r"targets must be int64 \[6\] or floating \[6, 4\].*\[5\]"),
    (torch.zeros(6), ValueError, r"targets must be int64 \[6\].*float32 \[6\]"),
    (torch.zeros(6, 5), ValueError, r"targets must be.*\[6, 5\]"),
    (CLASS_TARGETS.int(), TypeError, r"targets must be.*int32"),
    ([0] * 6, TypeError, r"targets must be.*list"),
    (CLASS_TARGETS + 4, ValueError, r"targets must be in 0\.\.3; got 4"),
    (CLASS_TARGETS - 100, ValueError, r"targets must be in 0\.\.3; got -100"),
    (torch.full((6, 4), 1.5), ValueError, r"targets must be in 0\.\.1; got 1\.5"),
    (torch.full((6, 4), NAN), ValueError, r"targets must be in 0\.\.1; got nan"),
]


@pytest.mark.parametrize(("targets", "error", "message"), BAD_TARGETS)
def test_bad_targets(targets, error, message):
    with pytest.raises(error, match=message):
        deep_supervision_loss(routing_of(), targets)


def test_bad_deep_supervision():
    for weights in ([1.0], [1.0] * 4, [1.0, -1.0, 1.0], [1.0, NAN, 1.0]):
        with pytest.raises(ValueError, match=r"weights must be 3 numbers"):
            deep_supervision_loss(routing_of(), CLASS_TARGETS, weights)
    with pytest.raises(ValueError, match=r"no exits.*cascade\.train\(\)"):
        deep_supervision_loss(routing_of(train=False), CLASS_TARGETS)
    with pytest.raises(TypeError, match=r"CascadeRouting.*Tensor"):
        deep_supervision_loss(samples(), CLASS_TARGETS)
