"""Cells of a chain: what their gates read, those that fuse everybody, those that stand alone."""

from weakref import ref

import pytest
import torch
from models import Function, assert_close, assert_same, backward
from stacks import CHANNELS, KINDS, Pool, batch, masked_chain, modules_of, parts
from test_chained import MODES, RULES, WISHES, build, wishing

from dynmm_kernels import ChainedFusion

# As DynMM's SkipESANet has them (0 skips, 1 fuses everybody, 2 is dynamic), and harder ones.
FUSING = {
    "2222": ["dynamic"] * 4,
    "1122": ["fuse_all", "fuse_all", "dynamic", "dynamic"],
    "0222": ["skip", "dynamic", "dynamic", "dynamic"],
    "2122": ["dynamic", "fuse_all", "dynamic", "dynamic"],
    "2212": ["dynamic", "dynamic", "fuse_all", "dynamic"],
    "2120": ["dynamic", "fuse_all", "dynamic", "skip"],
    "2103": ["dynamic", "fuse_all", "skip", "fuse"],
    "2221": ["dynamic", "dynamic", "dynamic", "fuse_all"],
    "2113": ["dynamic", "fuse_all", "fuse_all", "fuse"],
}
READ = ["cells", "stages"]

for_modes = pytest.mark.parametrize("mode", MODES)
for_reads = pytest.mark.parametrize("read", READ)
for_rules = pytest.mark.parametrize("rules", FUSING)


def check(mode, kind, rules, wishes, **settings):
    gates, pieces, chained = build(kind, rules, gate_grad=mode, **settings)
    inputs, modules = wishing(kind, wishes), modules_of(gates, *pieces)
    for wanted in ((), (1, 3)):
        reference = masked_chain(gates, *pieces, rules=rules, mode=mode, stages=wanted, **settings)
        expected = backward(reference, modules, inputs)
        for execution in ("routed", "masked"):
            chained.execution = execution
            actual = backward(lambda m, a, w=wanted: chained(m, a, stages=w), modules, inputs)
            assert_same(actual, expected)
        with torch.no_grad():
            chained.execution = "routed"
            assert_close(chained(*inputs, stages=wanted), reference(*inputs))


@pytest.mark.parametrize("wishes", WISHES)
@for_rules
@for_modes
def test_cells_that_fuse_everybody(mode, rules, wishes):
    check(mode, "mlp", FUSING[rules], WISHES[wishes])


@pytest.mark.parametrize("kind", KINDS)
@for_rules
@for_reads
@for_modes
def test_every_combination_of_wishes(mode, read, rules, kind):
    wishes = [[(n >> k) & 1 for k in range(4)] for n in range(16)]
    check(mode, kind, FUSING[rules], wishes * 2, gates_read=read)


@for_reads
@pytest.mark.parametrize("rules", [*RULES, *FUSING])
@for_modes
def test_independent_cells(mode, rules, read):
    wishes = [[(n >> k) & 1 for k in range(4)] for n in range(16)]
    rules = {**RULES, **FUSING}[rules]
    check(mode, "mlp", rules, wishes, gates_read=read, independent=True)


@pytest.mark.parametrize("seed", range(4))
@for_rules
@for_reads
@for_modes
def test_gates_that_decide_for_themselves(mode, read, rules, seed):
    """What a gate reads decides, and carries its gradient on into the streams."""
    torch.manual_seed(seed)
    rules = FUSING[rules]
    gates = [Pool(2 * CHANNELS, 2) if rule == "dynamic" else None for rule in rules]
    pieces, inputs = parts("nchw", 4), batch("nchw", 13)
    settings = {"rules": rules, "gates_read": read, "temperature": 0.8}
    chained = ChainedFusion(gates, *pieces, gate_grad=mode, execution="routed", **settings)
    reference = masked_chain(gates, *pieces, mode=mode, **settings)
    modules = modules_of(gates, *pieces)
    assert_same(backward(chained, modules, inputs), backward(reference, modules, inputs))


@for_rules
@for_reads
@pytest.mark.parametrize("independent", [False, True])
def test_dense_is_the_soft_chain(rules, read, independent):
    rules = FUSING[rules]
    gates = [Pool(2 * CHANNELS, 2) if rule == "dynamic" else None for rule in rules]
    pieces, inputs = parts("mlp", 4), batch("mlp", 6)
    settings = {"rules": rules, "gates_read": read, "independent": independent}
    chained = ChainedFusion(gates, *pieces, execution="dense", **settings)
    reference = masked_chain(gates, *pieces, mode="dense", **settings)
    modules = modules_of(gates, *pieces)
    assert_same(backward(chained, modules, inputs), backward(reference, modules, inputs))


@for_rules
@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_forced_depth(rules, execution):
    """Up to its depth a sample fuses; beyond it only where everybody does."""
    rules, wanted = FUSING[rules], [3, 0, 4, 1, 2, 0, 4]
    _, pieces, chained = build("mlp", rules, execution=execution)
    inputs, depth = wishing("mlp", [[1] * 4] * len(wanted)), torch.tensor(wanted)
    main, aux = inputs
    stages = []
    for k, rule in enumerate(rules):
        main, aux = pieces[0][k](main), pieces[1][k](aux)
        fuses = (depth > k) & (rule != "skip") | (rule == "fuse_all")
        main = torch.where(fuses.unsqueeze(1), pieces[2][k](main, aux), main)
        stages.append(main)
    output, (second,) = chained(*inputs, depth=depth, stages=[2])
    assert_close(output, stages[3])
    assert_close(second, stages[1])


@pytest.mark.parametrize("rules", ["2222", "2122", "0222"])
@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_reports(rules, execution):
    rules, wishes = FUSING[rules], WISHES["twice"]
    gates, pieces, chained = build("mlp", rules, execution=execution)
    keeps: list = []
    masked_chain(gates, *pieces, rules=rules, keeps=keeps)(*wishing("mlp", wishes))
    _, routing = chained(*wishing("mlp", wishes), return_routing=True)
    assert_close(routing.keep, torch.stack(keeps, 1))
    came = [
        next((k for k in range(4) if rules[k] == "dynamic" and not own[k]), 4) for own in wishes
    ]
    assert routing.choice.tolist() == came
    if execution == "routed":
        until = max((k for k in range(4) if rules[k] == "fuse_all"), default=-1)
        asked = [len(wishes) if k <= until else None for k in range(4)]
        assert all(rows == n for rows, n in zip(routing.rows_run[1:], asked, strict=True) if n)


def test_rows_behind_a_cell_that_fuses_everybody_are_the_survivors():
    """Without a gate that learns; before it, every sample runs."""
    rules, wishes = FUSING["2122"], WISHES["twice"]
    _, _, chained = build("mlp", rules)
    with torch.no_grad():
        _, routing = chained(*wishing("mlp", wishes), return_routing=True)
    third = sum(own[0] and own[2] for own in wishes)
    fourth = sum(own[0] and own[2] and own[3] for own in wishes)
    assert routing.rows_run == (6, 6, 6, third, fourth)


def test_random_decisions_of_independent_cells():
    """Each cell tosses its own coins: patterns occur that no depth can express."""
    rules = FUSING["2122"]
    _, pieces, chained = build("mlp", rules, independent=True)
    inputs = wishing("mlp", [[1] * 4] * 64)
    generator = torch.Generator().manual_seed(3)
    output, routing = chained(*inputs, depth="random", return_routing=True, generator=generator)
    fuses = routing.keep > 0
    assert fuses[:, 1].all()
    assert all(0 < n < 64 for n in fuses[:, [0, 2, 3]].sum(0).tolist())
    assert (~fuses[:, 2] & fuses[:, 3]).any()
    main, aux = inputs
    for k in range(4):
        main, aux = pieces[0][k](main), pieces[1][k](aux)
        main = torch.where(fuses[:, k : k + 1], pieces[2][k](main, aux), main)
    assert_close(output, main)
    assert torch.equal(routing.choice, fuses.sum(1))


def test_what_gates_read_is_let_go():
    """In eval the unfused maps live until their gate has read them, and no longer."""
    _, _, chained = build("mlp", FUSING["2222"], gates_read="stages")
    alive, watched = [], []

    def watch(module, arguments, output):
        alive.append(sum(output() is not None for output in watched))
        watched.append(ref(output))

    for stage in chained.main_stages:
        stage.module.register_forward_hook(watch)
    with torch.no_grad():
        chained(*wishing("mlp", WISHES["all keep"]))
    assert max(alive) <= 1


def test_bad_settings():
    gates, pieces, _ = build("mlp", FUSING["2222"])
    with pytest.raises(ValueError, match="gates_read must be one of 'cells', 'stages'; got 'maps'"):
        ChainedFusion(gates, *pieces, gates_read="maps")
    with pytest.raises(ValueError, match="a dynamic cell needs a gate"):
        ChainedFusion(gates, *pieces, rules=FUSING["2122"])
    chained = ChainedFusion(gates, *pieces)
    chained.gates["2"] = Function(lambda main, aux: main)
    assert chained.gates["2"].label == "gate 2"
    with pytest.raises(ValueError, match="gate 2 must return logits"):
        chained(*wishing("mlp", WISHES["all keep"]))
