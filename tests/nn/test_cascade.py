"""CascadeFusion against a loop over samples, and what each of its stages is given."""

import pytest
import torch
from cascades import (
    CLASSES,
    FUSES,
    INF,
    NAN,
    READS,
    SCORES,
    SPLITS,
    STAGES,
    N,
    Told,
    cascade_of,
    loop,
    networks,
    planned,
    probability,
    samples,
    three_inputs,
    thresholds_for,
    told,
)
from models import FEATURES, Calls, Function, assert_close, assert_same, backward
from torch import nn

from dynmm_kernels import CascadeFusion, Lazy, Shared, deep_supervision_loss, resource_loss
from dynmm_kernels.functional import plan
from dynmm_kernels.nn import Usage


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
