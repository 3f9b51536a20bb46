"""ChainedFusion against the masked formula in fp64, and what it runs, moves and refuses."""

import copy
import pickle

import pytest
import torch
from models import (
    Calls,
    Function,
    assert_bitwise,
    assert_close,
    assert_same,
    backward,
    relative_error,
)
from stacks import (
    CHANNELS,
    KINDS,
    HeaderReads,
    Pool,
    batch,
    masked_chain,
    modules_of,
    parts,
)
from torch import Tensor, nn

from dynmm_kernels import Branch, ChainedFusion, resource_loss
from dynmm_kernels.functional import autograd

MODES = ["straight_through", "selected", "none"]
RULES = {
    "dynamic": ["dynamic"] * 4,
    "static first": ["fuse", "fuse", "dynamic", "dynamic"],
    "static between": ["dynamic", "fuse", "skip", "dynamic"],
    "static behind": ["dynamic", "dynamic", "fuse", "skip"],
    "skip first": ["skip", "dynamic", "dynamic", "skip"],
    "only skip": ["skip"] * 4,
    "only fuse": ["fuse"] * 4,
}
# What the gates want of each sample, whether or not it was dropped before.
WISHES = {
    "all keep": [[1, 1, 1, 1]] * 4,
    "all drop at once": [[0, 1, 1, 1]] * 4,
    "nobody wants anything": [[0, 0, 0, 0]] * 3,
    "one after the other": [[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [1, 0, 1, 1]],
    "twice": [[0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 1, 1]],
    "second decision of the dropped": [[0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]],
    "nobody at the end": [[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0]],
    "one sample": [[1, 1, 0, 1]],
    "one sample, dropped": [[0, 1, 1, 1]],
    "no sample": [],
}


class Wish(nn.Module):
    """A gate whose decision is written in a channel of the main stream that nothing changes.

    It learns through `gate`, whose values it hides.
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = k
        self.gate = Pool(2 * CHANNELS, 2)

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        wishes = main[:, -1].detach().flatten(1)[:, 0] if main.dim() > 2 else main[:, -1].detach()
        keep = (wishes.round().long() >> self.k) & 1
        real = self.gate(main[:, :CHANNELS], aux[:, :CHANNELS])
        return 2 * nn.functional.one_hot(keep, 2).to(real.dtype) + (real - real.detach())


class Carry(nn.Module):
    """A stage on all channels but the last, which it passes on."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, *streams: Tensor) -> Tensor:
        made = self.stage(*(x[:, :CHANNELS] for x in streams))
        return torch.cat([made, streams[0][:, CHANNELS:]], 1)


class Normed(nn.Module):
    """A gate whose decisions depend on who else is in the batch."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(norm.num_features, 2, dtype=torch.float64)

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return self.linear(self.norm(main))


def build(kind, rules, **settings):
    pieces = tuple([Carry(m) for m in group] for group in parts(kind, len(rules)))
    gates = [Wish(k) if rule == "dynamic" else None for k, rule in enumerate(rules)]
    return gates, pieces, ChainedFusion(gates, *pieces, rules=rules, **settings)


def wishing(kind, wishes):
    """Both streams, with the wishes of each sample as bits in the last channel."""
    main, aux = batch(kind, len(wishes))
    bits = torch.tensor([sum(w << k for k, w in enumerate(own)) for own in wishes])
    last = bits.to(main.dtype).reshape(-1, *[1] * (main.dim() - 1)).expand_as(main[:, :1])
    main, aux = (torch.cat([x, last], 1) for x in (main, aux))
    if kind == "channels_last":
        return tuple(x.to(memory_format=torch.channels_last) for x in (main, aux))
    return main, aux


def survivors(wishes, rules):
    """Samples that come through each cell."""
    return [
        sum(all(own[j] or rules[j] != "dynamic" for j in range(k + 1)) for own in wishes)
        for k in range(len(rules))
    ]


def check(mode, kind, rules, wishes):
    gates, pieces, chained = build(kind, rules, gate_grad=mode)
    inputs = wishing(kind, wishes)
    modules = modules_of(gates, *pieces)
    for wanted in ((), (1, 3)):
        reference = masked_chain(gates, *pieces, rules=rules, mode=mode, stages=wanted)
        expected = backward(reference, modules, inputs)
        for execution in ("routed", "masked"):
            chained.execution = execution
            actual = backward(lambda m, a, w=wanted: chained(m, a, stages=w), modules, inputs)
            assert_same(actual, expected)


@pytest.mark.parametrize("wishes", WISHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_routed_is_masked(mode, kind, wishes, backend):
    check(mode, kind, RULES["dynamic"], WISHES[wishes])


@pytest.mark.parametrize("wishes", WISHES)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_static_cells(mode, rules, wishes):
    check(mode, "mlp", RULES[rules], WISHES[wishes])


@pytest.mark.parametrize("mode", MODES)
def test_every_combination_of_wishes(mode):
    wishes = [[(n >> k) & 1 for k in range(4)] for n in range(16)]
    check(mode, "mlp", RULES["dynamic"], wishes * 2)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mode", MODES)
def test_gates_that_decide_for_themselves(mode, seed):
    torch.manual_seed(seed)
    gates = [Pool(2 * CHANNELS, 2) for _ in range(4)]
    pieces = parts("nchw", 4)
    chained = ChainedFusion(gates, *pieces, gate_grad=mode, temperature=0.8)
    inputs = batch("nchw", 13)
    modules = modules_of(gates, *pieces)
    expected = backward(masked_chain(gates, *pieces, mode=mode, temperature=0.8), modules, inputs)
    assert_same(backward(chained, modules, inputs), expected)


@pytest.mark.parametrize("frozen", range(4))
@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_gate(mode, frozen):
    """Its logits still depend on the features, except in the first cell."""
    gates, pieces, chained = build("mlp", RULES["dynamic"], gate_grad=mode)
    gates[frozen].requires_grad_(False)
    inputs = wishing("mlp", WISHES["twice"])
    modules = modules_of(gates, *pieces)
    expected = backward(masked_chain(gates, *pieces, mode=mode), modules, inputs)
    assert_same(backward(chained, modules, inputs), expected)


def test_a_gate_that_does_not_learn_between_gates_that_do():
    gates, pieces, _ = build("mlp", RULES["dynamic"])
    gates[1] = Function(lambda m, a, gate=gates[1]: gate(m, a).detach())
    chained = ChainedFusion(gates, *pieces)
    inputs = wishing("mlp", WISHES["twice"])
    modules = modules_of(gates, *pieces)
    expected = backward(masked_chain(gates, *pieces), modules, inputs)
    assert_same(backward(chained, modules, inputs), expected)


@pytest.mark.parametrize("rules", ["dynamic", "static between"])
def test_dense_is_the_soft_chain(rules):
    gates = [Pool(2 * CHANNELS, 2) if rule == "dynamic" else None for rule in RULES[rules]]
    pieces = parts("mlp", 4)
    chained = ChainedFusion(gates, *pieces, rules=RULES[rules], execution="dense")
    inputs = batch("mlp", 6)
    modules = modules_of(gates, *pieces)
    reference = masked_chain(gates, *pieces, rules=RULES[rules], mode="dense")
    assert_same(backward(chained, modules, inputs), backward(reference, modules, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", RULES)
def test_without_a_graph(rules, kind):
    gates, pieces, chained = build(kind, RULES[rules])
    stages = (1, 2, 3, 4)
    for wishes in WISHES.values():
        inputs = wishing(kind, wishes)
        before = [x.clone() for x in inputs]
        with torch.no_grad():
            reference = masked_chain(gates, *pieces, rules=RULES[rules], stages=stages)
            expected = reference(*inputs)
            assert_close(chained(*inputs, stages=stages), expected)
            assert_close(chained(*inputs), expected[0])
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_rows_are_exactly_the_survivors():
    rules, wishes = RULES["static between"], WISHES["twice"]
    gates, (main, aux, fusions), chained = build("mlp", rules)
    calls = Calls.of([*main, *aux, *fusions, gates[0], gates[3]])
    with torch.no_grad():
        chained(*wishing("mlp", wishes))
    first, second, third, fourth = survivors(wishes, rules)
    assert calls.rows[:4] == [[6]] * 4
    assert calls.rows[4:8] == [[first], [second], [third], [fourth]]
    assert calls.rows[8:12] == [[first], [second], [], [fourth]]
    assert calls.rows[12:] == [[6], [third]]


def test_the_dropped_follow_only_while_a_gate_needs_it():
    wishes = [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1]]
    gates, (_, aux, fusions), chained = build("mlp", RULES["dynamic"])
    calls = Calls.of([*aux, *fusions, *gates])
    chained(*wishing("mlp", wishes))
    # The rest runs first: both dropped in cell 1, one of them in cell 2, then nobody.
    follows = [[2, 1], [1, 1], [1], [1]]
    assert calls.rows[:8] == follows * 2
    assert calls.rows[8:] == [[3], [1, 2], [1, 1], [1]]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_called_without_rows(mode):
    for rules in RULES.values():
        for wishes in WISHES.values():
            if wishes:
                gates, pieces, chained = build("mlp", rules, gate_grad=mode)
                calls = Calls.of(modules_of(gates, *pieces))
                chained(*wishing("mlp", wishes))
                assert all(rows > 0 for per_module in calls.rows for rows in per_module)


@pytest.mark.parametrize(
    ("rules", "wishes", "reads"),
    [
        ("dynamic", "twice", 4),
        ("static first", "twice", 2),
        ("only fuse", "twice", 0),
        ("dynamic", "all drop at once", 1),
    ],
)
def test_one_synchronisation_per_dynamic_cell(rules, wishes, reads, monkeypatch):
    _, _, chained = build("mlp", RULES[rules])
    inputs = wishing("mlp", WISHES[wishes])
    counter = HeaderReads(monkeypatch)
    with torch.no_grad():
        chained(*inputs)
    assert counter.count == reads
    counter.count = 0
    chained.gate_grad = "selected"
    chained(*inputs, stages=(1, 2))
    assert counter.count == reads


@pytest.mark.parametrize("wishes", ["all keep", "all drop at once"])
def test_nothing_moves_while_all_agree(wishes, monkeypatch):
    gates, pieces, chained = build("mlp", RULES["dynamic"])
    inputs = wishing("mlp", WISHES[wishes])
    expected = masked_chain(gates, *pieces)(*inputs)

    def refuse(*args):
        raise AssertionError("moved")

    for name in ("gather", "combine"):
        monkeypatch.setattr(autograd, name, refuse)
    assert_close(chained(*inputs), expected)


@pytest.mark.parametrize("execution", ["routed", "masked", "dense"])
def test_forced_depth(execution):
    rules = RULES["static between"]
    gates, pieces, chained = build("mlp", rules, execution=execution)
    calls = Calls.of(modules_of(gates))
    depths = torch.tensor([0, 4, 2, 3, 1])
    inputs = wishing("mlp", [[1] * 4] * 5)
    wanted = []
    for n, depth in enumerate(depths.tolist()):
        m, a = (x[n : n + 1] for x in inputs)
        for k, rule in enumerate(rules):
            m, a = pieces[0][k](m), pieces[1][k](a)
            if k < depth and rule != "skip":
                m = pieces[2][k](m, a)
        wanted.append(m)
    assert_close(chained(*inputs, depth=depths), torch.cat(wanted))
    assert calls.rows == [[], []]


@pytest.mark.parametrize("mode", MODES)
def test_same_inputs_same_bits(mode, backend):
    gates, pieces, chained = build("nchw", RULES["dynamic"], gate_grad=mode, execution="routed")
    inputs = wishing("nchw", WISHES["twice"])
    modules = modules_of(gates, *pieces)
    first = backward(chained, modules, inputs)
    for _ in range(3):
        assert_bitwise(backward(chained, modules, inputs), first)


@pytest.mark.parametrize("where", ["aux", "gate"])
def test_batch_norm_runs_masked(where):
    gates, pieces, _ = build("mlp", RULES["dynamic"])
    norm = nn.BatchNorm1d(CHANNELS + 1, dtype=torch.float64)
    if where == "aux":
        pieces[1][2] = nn.Sequential(pieces[1][2], norm)
    else:
        gates[2] = Normed(norm)
    reference = masked_chain(copy.deepcopy(gates), *copy.deepcopy(pieces))
    chained = ChainedFusion(gates, *pieces)
    inputs = wishing("mlp", WISHES["twice"])
    calls = Calls.of([pieces[1][0], norm])
    assert_close(chained(*inputs), reference(*inputs))
    assert calls.rows == [[6], [6]]
    calls.clear()
    chained.eval()
    with torch.no_grad():
        chained(*inputs)
    assert calls.rows[0] == [4]


def test_batch_norm_on_subsets_records_the_own_samples_once():
    gates, pieces, _ = build("mlp", RULES["dynamic"])
    norm = nn.BatchNorm1d(CHANNELS + 1, dtype=torch.float64)
    pieces[1][0] = nn.Sequential(pieces[1][0], norm)
    chained = ChainedFusion(gates, *pieces, batch_norm="subset")
    inputs = wishing("mlp", WISHES["twice"])
    chained(*inputs)
    kept = torch.tensor([wish[0] == 1 for wish in WISHES["twice"]])
    assert norm.num_batches_tracked == 1
    assert_close(norm.running_mean, 0.1 * pieces[1][0][0](inputs[1])[kept].mean(0).detach())


@pytest.mark.parametrize("mode", MODES)
def test_a_norm_in_a_gate_records_the_survivors_once(mode):
    """Not those that it is asked about as well, because the exact gradient wants to know."""
    gates, pieces, _ = build("mlp", RULES["dynamic"])
    norm = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    gates[1].gate = Normed(norm)
    chained = ChainedFusion(gates, *pieces, gate_grad=mode, batch_norm="subset")
    calls = Calls.of([norm])
    chained(*wishing("mlp", WISHES["twice"]))
    assert calls.rows == [[4, 2] if mode == "straight_through" else [4]]
    assert norm.num_batches_tracked == 1
    (survivors_seen,) = calls.arguments[0][0]
    assert_close(norm.running_mean, 0.1 * survivors_seen.mean(0).detach())


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("mode", MODES)
def test_routing(mode, execution):
    rules, wishes = RULES["static between"], WISHES["twice"]
    gates, (main, aux, fusions), _ = build("mlp", rules)
    chained = ChainedFusion(
        [gate if gate is None else Branch(gate, cost=0.5) for gate in gates],
        main,
        [Branch(a, cost=float(k)) for k, a in enumerate(aux, start=1)],
        fusions,
        rules=rules,
        gate_grad=mode,
        execution=execution,
    )
    inputs = wishing("mlp", wishes)
    output, routing = chained(*inputs, return_routing=True)
    assert_close(output, chained(*inputs))
    depths = [0 if not own[0] else 3 + own[3] for own in wishes]
    assert routing.choice.tolist() == depths
    assert routing.counts == tuple(depths.count(d) for d in range(5))
    costs = (0.0, 1.0, 3.0, 6.0, 10.0)
    assert routing.costs == costs
    assert routing.weights.detach().argmax(1).tolist() == depths
    assert routing.keep.detach().sum(1).tolist() == depths
    loss = resource_loss(routing)
    assert loss.item() == pytest.approx(sum(costs[d] for d in depths) / 6)
    if mode == "none":
        assert not loss.requires_grad
        return
    modules = modules_of(gates, main, aux, fusions)
    keeps: list[Tensor] = []
    masked_chain(gates, main, aux, fusions, rules=rules, mode=mode, keeps=keeps)(*inputs)
    expected = sum(k * keep for k, keep in enumerate(keeps, start=1)).mean()
    parameters = [p for module in modules for p in module.parameters()]
    pairs = zip(
        torch.autograd.grad(loss, parameters, materialize_grads=True),
        torch.autograd.grad(expected, parameters, materialize_grads=True),
        strict=True,
    )
    for actual, wanted in pairs:
        assert relative_error(actual, wanted) < 1e-10 if wanted.any() else not actual.any()


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("rules", ["dynamic", "only fuse"])
def test_keep_is_as_wide_as_the_model(rules, execution):
    """With and without a graph, so that a cost does not depend on it."""
    wishes = WISHES["twice"]
    _, _, chained = build("mlp", RULES[rules], execution=execution)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, routing = chained(*wishing("mlp", wishes), return_routing=True)
        assert routing.keep.dtype == routing.weights.dtype == torch.float64


def test_executed_cost():
    rules, wishes = RULES["dynamic"], WISHES["twice"]
    gates, (main, aux, fusions), _ = build("mlp", rules)
    chained = ChainedFusion(
        [Branch(gate, cost=0.5) for gate in gates],
        main,
        [Branch(a, cost=1.0) for a in aux],
        fusions,
    )
    with torch.no_grad():
        _, routing = chained(*wishing("mlp", wishes), return_routing=True)
    stayed = survivors(wishes, rules)
    assert routing.rows_run == (6, *stayed)
    asked = [6, *stayed[:-1]]
    assert routing.executed_cost == pytest.approx((sum(stayed) + 0.5 * sum(asked)) / 6)
    chained.execution = "dense"
    _, routing = chained(*wishing("mlp", wishes), return_routing=True)
    assert routing.executed_cost == pytest.approx(4 + 2)
    assert routing.choice is None
    assert routing.expected_cost.requires_grad


@pytest.mark.parametrize(("grad", "asked"), [(True, 3 + 3), (False, 3 + 2)])
def test_gates_are_paid_for_followers_too(grad, asked):
    """One sample of three drops out, and the exact gradient asks the second gate about it."""
    rules = ["dynamic"] * 2
    gates, (main, aux, fusions), _ = build("mlp", rules)
    gates, aux = ([Branch(module, cost=1.0) for module in group] for group in (gates, aux))
    chained = ChainedFusion(gates, main, aux, fusions)
    with torch.set_grad_enabled(grad):
        _, routing = chained(*wishing("mlp", [[1, 1], [0, 1], [1, 1]]), return_routing=True)
    assert routing.gate_cost == pytest.approx(asked / 3)


def test_ties_drop():
    gate = Function(lambda m, a: m.new_zeros(len(m), 2))
    chained = ChainedFusion([gate] * 2, *parts("mlp", 2))
    assert chained(*batch("mlp", 3), return_routing=True)[1].choice.tolist() == [0, 0, 0]


def test_gumbel_noise():
    gate = Function(lambda m, a: m.new_zeros(len(m), 2))
    chained = ChainedFusion([gate] * 3, *parts("mlp", 3), noise="gumbel")
    inputs = batch("mlp", 64)

    def depths(seed):
        generator = torch.Generator().manual_seed(seed)
        return chained(*inputs, generator=generator, return_routing=True)[1].choice

    assert torch.equal(depths(1), depths(1))
    assert depths(1).unique().tolist() == [0, 1, 2, 3]
    chained.eval()
    assert not depths(1).any()


def test_copies_and_state():
    _, _, chained = build("mlp", RULES["static between"])
    inputs = wishing("mlp", WISHES["twice"])
    expected = chained(*inputs)
    assert_close(copy.deepcopy(chained)(*inputs), expected)
    assert_close(pickle.loads(pickle.dumps(chained))(*inputs), expected)
    _, _, other = build("mlp", RULES["static between"])
    other.load_state_dict(chained.state_dict())
    assert_close(other(*inputs), expected)


@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_a_broken_gate_is_reported(execution):
    def keep_some(m, a):
        return torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=m.dtype)

    def broken(m, a):
        logits = m.new_zeros(len(m), 2)
        logits[-1, 0] = torch.nan
        return logits

    settings = {"execution": execution}
    pieces = parts("mlp", 2)
    inputs = batch("mlp", 3)
    chained = ChainedFusion([Function(keep_some), Function(broken)], *pieces, **settings)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(ValueError, match=r"gate 2.*nan.*in row 2"):
            chained(*inputs)
    chained = ChainedFusion([Function(keep_some), Function(lambda m, a: m)], *pieces, **settings)
    with pytest.raises(ValueError, match=r"gate 2 must return logits of shape \[[23], 2\]"):
        chained(*inputs)


def test_bad_construction():
    pieces = parts("mlp", 2)
    gate = Pool(2 * CHANNELS, 2)
    with pytest.raises(ValueError, match="one rule per cell, 2; got 1 and 1"):
        ChainedFusion([gate], *pieces)
    with pytest.raises(ValueError, match="'skip', 'fuse', 'fuse_all', 'dynamic'; got 'maybe'"):
        ChainedFusion([gate, gate], *pieces, rules=["dynamic", "maybe"])
    with pytest.raises(ValueError, match="cell 2 is 'dynamic' with gate NoneType"):
        ChainedFusion([gate, None], *pieces, rules=["dynamic", "dynamic"])
    with pytest.raises(ValueError, match="cell 1 is 'fuse' with gate Pool"):
        ChainedFusion([gate, None], *pieces, rules=["fuse", "skip"])
    with pytest.raises(ValueError, match="got 2, 2 and 1"):
        ChainedFusion([gate, gate], pieces[0], pieces[1], pieces[2][:1])
