"""NestedFusion against the masked formula in fp64, and what it runs, moves and refuses."""

import copy
import io
import pickle

import pytest
import torch
from models import (
    Calls,
    Function,
    Planned,
    assert_bitwise,
    assert_close,
    assert_same,
    backward,
    choosing,
    mlp,
)
from stacks import (
    CHANNELS,
    KINDS,
    HeaderReads,
    Pool,
    batch,
    masked_nested,
    modules_of,
    parts,
)
from torch import nn

from dynmm_kernels import Branch, NestedFusion, resource_loss
from dynmm_kernels.functional import autograd

# Depths in 0..4.
PATTERNS = {
    "all 0": [0, 0, 0, 0, 0],
    "all to the end": [4, 4, 4],
    "one depth": [2, 2, 2, 2],
    "one of each": [3, 0, 4, 1, 2],
    "mixed": [0, 4, 2, 2, 0, 1, 4, 0, 3],
    "nobody at the end": [1, 0, 2, 1, 0, 0],
    "one sample": [2],
    "one sample, depth 0": [0],
    "no sample": [],
}
MODES = ["straight_through", "selected", "none"]


def build(kind, depths, num_stages=4, **settings):
    """Gate that chooses these depths, parts, and the fusion over them."""
    depths = torch.tensor(depths, dtype=torch.int64).clamp(max=num_stages)
    gate = Planned(Pool(2 * CHANNELS, num_stages + 1), depths, num_stages + 1)
    pieces = parts(kind, num_stages)
    return gate, pieces, NestedFusion(gate, *pieces, **settings)


@pytest.mark.parametrize("num_stages", [1, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_routed_is_masked(mode, kind, pattern, num_stages, backend):
    gate, pieces, nested = build(kind, PATTERNS[pattern], num_stages, gate_grad=mode)
    inputs = batch(kind, len(PATTERNS[pattern]))
    stages = (1,) if num_stages == 1 else (1, 3, 4)
    for wanted in ((), stages):
        reference = masked_nested(gate, *pieces, mode=mode, stages=wanted)
        expected = backward(reference, modules_of(gate, *pieces), inputs)
        for execution in ("routed", "masked"):
            nested.execution = execution
            actual = backward(
                lambda m, a, wanted=wanted: nested(m, a, stages=wanted), [nested], inputs
            )
            order = [p for module in modules_of(gate, *pieces) for p in module.parameters()]
            by_parameter = dict(zip(nested.parameters(), actual.parameters, strict=True))
            actual.parameters = [by_parameter[p] for p in order]
            assert_same(actual, expected)
            if mode != "none":
                assert all(gradient is not None for gradient in actual.all())


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("mode", MODES)
def test_starved_stages_get_zeros(mode, execution):
    _, pieces, nested = build("mlp", [1, 0, 1], gate_grad=mode, execution=execution)
    backward(nested, [], batch("mlp", 3))
    for stage in (*pieces[1][1:], *pieces[2][1:]):
        for parameter in stage.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_dense_is_the_soft_sum():
    gate, pieces, nested = build("mlp", PATTERNS["mixed"], execution="dense", temperature=0.7)
    inputs = batch("mlp", 9)
    reference = masked_nested(gate, *pieces, mode="dense", temperature=0.7)
    expected = backward(reference, [nested], inputs)
    assert_same(backward(nested, [nested], inputs), expected)


@pytest.mark.parametrize("temperature", [0.3, 5.0])
def test_temperature(temperature):
    gate, pieces, nested = build("mlp", PATTERNS["mixed"], temperature=temperature)
    inputs = batch("mlp", 9)
    expected = backward(masked_nested(gate, *pieces, temperature=temperature), [nested], inputs)
    assert_same(backward(nested, [nested], inputs), expected)


@pytest.mark.parametrize("frozen", ["gate", "main_stages", "aux_stages", "fusions"])
@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_part(mode, frozen):
    gate, pieces, nested = build("mlp", PATTERNS["mixed"], gate_grad=mode)
    getattr(nested, frozen).requires_grad_(False)
    inputs = batch("mlp", 9)
    expected = backward(masked_nested(gate, *pieces, mode=mode), [nested], inputs)
    assert_same(backward(nested, [nested], inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_graph(kind, backend):
    gate, pieces, nested = build(kind, PATTERNS["mixed"])
    nested.eval()
    inputs = batch(kind, 9)
    before = [x.clone() for x in inputs]
    stages = (1, 2, 3, 4)
    expected = masked_nested(gate, *pieces, stages=stages)(*inputs)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_close(nested(*inputs, stages=stages), expected)
            assert_close(nested(*inputs), expected[0])
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_channels_last_is_kept():
    _, _, nested = build("channels_last", PATTERNS["mixed"])
    inputs = batch("channels_last", 9)
    with torch.no_grad():
        output, stages = nested(*inputs, stages=(1, 2, 3))
    for tensor in (output, *stages, nested(*inputs)):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_streams_of_different_shape():
    stages = [nn.Conv2d(1, 2, 3, padding=1, dtype=torch.float64)]
    nested = NestedFusion(
        Function(lambda m, a: torch.eye(3, 2, dtype=torch.float64)[: len(m)]),
        [nn.Linear(5, 2, dtype=torch.float64)],
        stages,
        [Function(lambda r, a: r + a.mean((2, 3)))],
    )
    main = torch.randn(3, 5, dtype=torch.float64)
    aux = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    expected = nested.main_stages[0](main)
    expected[1] += stages[0](aux)[1].mean((1, 2))
    assert_close(nested(main, aux), expected)


def test_auxiliary_rows_are_exactly_those_that_need_them():
    depths = PATTERNS["mixed"]
    _, (main, aux, fusions), nested = build("mlp", depths, gate_grad="none")
    calls = Calls.of([*main, *aux, *fusions])
    nested(*batch("mlp", 9))
    reach = [sum(d >= k for d in depths) for k in range(1, 5)]
    assert calls.rows == [[9]] * 4 + [[n] for n in reach] * 2

    calls.clear()
    nested(*batch("mlp", 9), depth=1)
    assert calls.rows == [[9]] * 4 + [[9], [], [], []] * 2

    calls.clear()
    nested.gate_grad = "straight_through"
    nested(*batch("mlp", 9))
    rest = [9 - n for n in reach]
    assert calls.rows == [[9]] * 4 + [[r, n] for r, n in zip(rest, reach, strict=True)] * 2


@pytest.mark.parametrize("mode", MODES)
def test_stages_are_never_called_without_rows(mode):
    for depths in PATTERNS.values():
        if depths:
            _, (main, aux, fusions), nested = build("mlp", depths, gate_grad=mode)
            calls = Calls.of([*main, *aux, *fusions])
            nested(*batch("mlp", len(depths)))
            assert all(rows > 0 for per_module in calls.rows for rows in per_module)


def test_one_synchronisation_one_gather_one_combine(monkeypatch):
    _, _, nested = build("mlp", PATTERNS["mixed"])
    inputs = batch("mlp", 9)
    moves = []
    for name in ("gather", "combine"):
        original = getattr(autograd, name)
        monkeypatch.setattr(
            autograd,
            name,
            lambda *args, name=name, original=original: moves.append(name) or original(*args),
        )
    reads = HeaderReads(monkeypatch)
    for context, wanted in ((torch.no_grad(), ()), (torch.enable_grad(), (2,))):
        reads.count = 0
        moves.clear()
        with context:
            nested(*inputs, stages=wanted)
        assert reads.count == 1
        assert moves == ["gather", *["combine"] * (1 + len(wanted))]


@pytest.mark.parametrize("depth", [0, 2, 4])
def test_one_depth_moves_nothing(depth, monkeypatch):
    gate, pieces, nested = build("mlp", [depth] * 5)
    inputs = batch("mlp", 5)
    expected = masked_nested(gate, *pieces, stages=(1, 2))(*inputs)

    def refuse(*args):
        raise AssertionError("moved")

    for name in ("gather", "combine"):
        monkeypatch.setattr(autograd, name, refuse)
    assert_close(nested(*inputs, stages=(1, 2)), expected)
    with torch.no_grad():
        assert_close(nested(*inputs, stages=(1, 2)), expected)


def test_forced_depth():
    gate, pieces, nested = build("mlp", [0] * 9)
    inputs = batch("mlp", 9)
    depths = torch.tensor(PATTERNS["mixed"])
    calls = Calls.of([gate])
    for execution in ("routed", "masked", "dense"):
        nested.execution = execution
        for depth in (0, 3, 4, depths, depths.int()):
            full = depth if isinstance(depth, torch.Tensor) else torch.full((9,), depth)
            fixed = choosing(full.tolist(), 5)
            expected = backward(masked_nested(fixed, *pieces), modules_of(*pieces), inputs)
            actual = backward(
                lambda m, a, depth=depth: nested(m, a, depth=depth), modules_of(*pieces), inputs
            )
            assert_same(actual, expected)
    assert calls.rows == [[]]


def test_an_unselected_nan_does_not_spread():
    _, (main, _, fusions), _ = build("mlp", [0])
    poison = [Function(lambda a: a * float("nan")) for _ in range(4)]
    nested = NestedFusion(choosing([0, 4, 0], 5), main, poison, fusions)
    with torch.no_grad():
        output = nested(*batch("mlp", 3))
    assert output[[0, 2]].isfinite().all()
    assert output[1].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_same_inputs_same_bits(mode, backend):
    _, _, nested = build("nchw", PATTERNS["mixed"], gate_grad=mode, execution="routed")
    inputs = batch("nchw", 9)
    first = backward(nested, [nested], inputs)
    for _ in range(3):
        assert_bitwise(backward(nested, [nested], inputs), first)


def test_identity_parts_share_no_memory_with_inputs_or_stages():
    """Stages and fusions that return what they got, so that everything could alias."""
    identity = [nn.Identity() for _ in range(3)]
    main, aux, total = (lambda r, a: r), (lambda r, a: a), (lambda r, a: r + a)
    for depths in ([3, 3, 3], [0, 0, 0], [2, 0, 3], [1, 3, 3]):
        for calls in ([main] * 3, [aux] * 3, [total] * 3, [aux, total, total]):
            fusions = [Function(call) for call in calls]
            gate = choosing(depths, 4)
            nested = NestedFusion(gate, identity, identity, fusions)
            inputs = batch("mlp", 3)
            before = [x.clone() for x in inputs]
            reference = masked_nested(gate, identity, identity, fusions, stages=(1, 2, 3))
            expected = reference(*inputs)
            with torch.no_grad():
                output, stages = nested(*inputs, stages=(1, 2, 3))
                assert_close((output, stages), expected)
                output.fill_(7.0)
            assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_parameters_and_buffers_are_not_written_to():
    class Constant(nn.Module):
        def __init__(self, rows, parameter):
            super().__init__()
            value = torch.randn(CHANNELS, dtype=torch.float64).repeat(rows, 1)
            if parameter:
                self.value = nn.Parameter(value)
            else:
                self.register_buffer("value", value)

        def forward(self, x):
            return self.value

    for parameter in (True, False):
        main = [Constant(3, parameter)]
        before = main[0].value.clone()
        nested = NestedFusion(
            choosing([1, 0, 1], 2), main, [nn.Identity()], [Function(lambda r, a: r + a)]
        )
        inputs = batch("mlp", 3)
        with torch.no_grad():
            output = nested(*inputs)
        assert torch.equal(main[0].value, before)
        fuses = torch.tensor([[1.0], [0.0], [1.0]])
        assert_close(output, before + inputs[1] * fuses)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wide", [False, True])
def test_autocast(wide, mode):
    """A fusion may then end in another dtype than its main stage; both executions end in one."""
    fusion = Function(lambda r, a: (r + a).float() if wide else r + a)
    linear = [nn.Linear(CHANNELS, CHANNELS) for _ in range(6)]
    gate = choosing([2, 0, 3, 1], 4, torch.float32)
    nested = NestedFusion(gate, linear[:3], linear[3:], [fusion] * 3, gate_grad=mode)
    inputs = [x.float() for x in batch("mlp", 4)]
    outputs = []
    with torch.autocast("cpu", torch.bfloat16):
        for nested.execution in ("masked", "routed"):
            outputs.append(nested(*inputs))
        with torch.no_grad():
            outputs.append(nested(*inputs))
    outputs[1].float().sum().backward()
    assert {x.dtype for x in outputs} == {torch.float32 if wide else torch.bfloat16}
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


class NormedFusion(nn.Module):
    """A fusion whose rows depend on each other."""

    def __init__(self, fusion: nn.Module, norm: nn.Module):
        super().__init__()
        self.fusion, self.norm = fusion, norm

    def forward(self, main, aux):
        return self.norm(self.fusion(main, aux))


def with_norm(where: str):
    """Three cells with BatchNorm in the second, and the norm."""
    main, aux, fusions = parts("mlp", 3)
    norm = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    if where == "aux stage":
        aux[1] = nn.Sequential(aux[1], norm)
    else:
        fusions[1] = NormedFusion(fusions[1], norm)
    return (main, aux, fusions), norm


for_norms = pytest.mark.parametrize("where", ["aux stage", "fusion"])


@for_norms
def test_batch_norm_runs_masked(where):
    depths = [0, 3, 2, 1, 2, 3]
    gate = choosing(depths, 4)
    pieces, _ = with_norm(where)
    nested = NestedFusion(gate, *pieces)
    reference = masked_nested(gate, *copy.deepcopy(pieces))
    calls = Calls.of(pieces[1])
    inputs = batch("mlp", 6)
    assert_close(nested(*inputs), reference(*inputs))
    assert calls.rows == [[6], [6], [6]]
    calls.clear()
    nested.eval()
    with torch.no_grad():
        nested(*inputs)
    assert calls.rows == [[5], [4], [2]]


@for_norms
@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_on_subsets_records_the_own_samples_once(mode, where):
    depths = torch.tensor([0, 3, 2, 1, 2, 3])
    (main, aux, fusions), norm = with_norm(where)
    gate = choosing(depths.tolist(), 4)
    nested = NestedFusion(gate, main, aux, fusions, gate_grad=mode, batch_norm="subset")
    inputs = batch("mlp", 6)
    nested(*inputs)
    assert norm.num_batches_tracked == 1
    r, a = main[0](inputs[0]), aux[0](inputs[1])
    if where == "aux stage":
        features = aux[1][0](a)
    else:
        m = torch.where(depths.unsqueeze(1) >= 1, fusions[0](r, a), r)
        features = fusions[1].fusion(main[1](m), aux[1](a))
    assert_close(norm.running_mean, 0.1 * features[depths >= 2].mean(0).detach())


def test_routing():
    depths = PATTERNS["mixed"]
    gate, (main, aux, fusions), _ = build("mlp", depths)
    nested = NestedFusion(
        Branch(gate, cost=0.5),
        [Branch(m, cost=10.0) for m in main],
        [Branch(a, cost=float(k)) for k, a in enumerate(aux, start=1)],
        [fusions[0], Branch(fusions[1], cost=0.25), *fusions[2:]],
    )
    inputs = batch("mlp", 9)
    output, routing = nested(*inputs, return_routing=True)
    assert_close(output, nested(*inputs))
    assert routing.choice.tolist() == depths
    assert routing.counts == tuple(depths.count(d) for d in range(5))
    assert routing.fractions == tuple(depths.count(d) / 9 for d in range(5))
    costs = [40.0, 41.0, 43.25, 46.25, 50.25]
    assert routing.costs == tuple(costs)
    assert routing.rows_run == (9, 9, 9, 9, 9)
    mean = sum(costs[d] for d in depths) / 9
    assert resource_loss(routing).item() == pytest.approx(mean)
    probs = torch.softmax(gate(*inputs), dim=1)
    assert routing.expected_cost.item() == pytest.approx(
        (probs @ probs.new_tensor(costs)).mean().item() + 0.5
    )
    assert routing.executed_cost == pytest.approx(50.75)
    (gradient,) = torch.autograd.grad(resource_loss(routing), gate.gate.linear.bias)
    assert gradient.any()

    with torch.no_grad():
        _, routing = nested(*inputs, return_routing=True)
    assert routing.rows_run == (9, 6, 5, 3, 2)
    assert routing.executed_cost == pytest.approx(mean + 0.5)
    _, routing = nested(*inputs, depth=2, return_routing=True)
    assert routing.counts == (0, 0, 9, 0, 0)
    assert routing.executed_cost == pytest.approx(43.25)
    nested.execution = "dense"
    _, routing = nested(*inputs, return_routing=True)
    assert routing.counts == (0, 0, 0, 0, 9)
    assert routing.executed_cost == pytest.approx(50.75)
    (output, stages), _ = nested(*inputs, stages=(2,), return_routing=True)
    assert len(stages) == 1
    assert output.shape == (9, CHANNELS)


def test_ties_take_the_shallowest():
    _, pieces, _ = build("mlp", [0])
    nested = NestedFusion(Function(lambda m, a: m.new_zeros(len(m), 5)), *pieces)
    _, routing = nested(*batch("mlp", 3), return_routing=True)
    assert routing.choice.tolist() == [0, 0, 0]


def test_gumbel_noise():
    gate = Function(lambda m, a: m.new_zeros(len(m), 5))
    nested = NestedFusion(gate, *parts("mlp", 4), noise="gumbel")
    inputs = batch("mlp", 64)

    def depths(seed):
        generator = torch.Generator().manual_seed(seed)
        return nested(*inputs, generator=generator, return_routing=True)[1].choice

    assert torch.equal(depths(1), depths(1))
    assert not torch.equal(depths(1), depths(2))
    assert depths(1).unique().tolist() == [0, 1, 2, 3, 4]
    nested.eval()
    assert not depths(1).any()


def test_copies_and_state():
    _, _, nested = build("mlp", PATTERNS["mixed"])
    inputs = batch("mlp", 9)
    expected = nested(*inputs)
    assert_close(copy.deepcopy(nested)(*inputs), expected)
    assert_close(pickle.loads(pickle.dumps(nested))(*inputs), expected)
    buffer = io.BytesIO()
    torch.save(nested.state_dict(), buffer)
    buffer.seek(0)
    _, _, other = build("mlp", [0] * 9)
    other.load_state_dict(torch.load(buffer))
    assert_close(other(*inputs), expected)


def nested_of(gate=None, main=None, aux=None, fusions=None, **settings):
    pieces = parts("mlp", 2)
    return NestedFusion(
        gate or choosing([2, 0, 1], 3),
        main or pieces[0],
        aux or pieces[1],
        fusions or pieces[2],
        **settings,
    )


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (
            {"aux": [nn.Identity(), Function(lambda a: a[:1])]},
            ValueError,
            r"aux stage 2 must return [23] rows",
        ),
        ({"aux": [Function(lambda a: (a,)), nn.Identity()]}, TypeError, "aux stage 1.*tuple"),
        ({"main": [nn.Identity(), Function(lambda m: m[0])]}, ValueError, "main stage 2.*3 rows"),
        ({"fusions": [Function(lambda r, a: r[:, :2])] * 2}, ValueError, "fusion 1.*shape"),
        ({"fusions": [Function(lambda r, a: r.float())] * 2}, TypeError, "fusion 1.*float64"),
        (
            {"aux": [Function(lambda a: a.to("meta")), nn.Identity()]},
            ValueError,
            "aux stage 1 must return rows on cpu.*got meta",
        ),
        ({"main": [nn.Linear(9, 9)] * 2}, RuntimeError, "in main stage 1"),
        ({"gate": choosing([0, 1, 2], 4)}, ValueError, r"\[3, 3\].*\[3, 4\]"),
        ({"gate": Function(lambda m, a: m.new_full((3, 3), torch.nan))}, ValueError, "finite"),
    ],
)
def test_a_broken_part_is_named(execution, broken, error, message):
    with pytest.raises(error, match=message):
        nested_of(execution=execution, **broken)(*batch("mlp", 3))


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize(
    ("depth", "error", "message"),
    [
        (3, ValueError, r"0\.\.2.*got 3"),
        (-1, ValueError, r"0\.\.2.*got -1"),
        (torch.tensor([0, 3, 1]), ValueError, "got 3 in row 1"),
        (torch.tensor([0, 1, -1]), ValueError, "got -1 in row 2"),
        (torch.tensor([0, 1]), ValueError, r"shape \[3\]"),
        (1.0, TypeError, "float"),
        (True, TypeError, "bool"),
    ],
)
def test_bad_depth(execution, depth, error, message):
    with pytest.raises(error, match=message):
        nested_of(execution=execution)(*batch("mlp", 3), depth=depth)


def test_bad_calls():
    main, aux = batch("mlp", 3)
    nested = nested_of()
    with pytest.raises(ValueError, match="same number of samples"):
        nested(main, aux[:2])
    with pytest.raises(TypeError, match=r"aux must be a strided tensor.*list"):
        nested(main, [aux])
    with pytest.raises(ValueError, match="scalar"):
        nested(main.sum(), aux)
    for k in (0, 3, "1", True):
        with pytest.raises(ValueError, match=r"stages must be numbers in 1\.\.2"):
            nested(main, aux, stages=(k,))
    with pytest.raises(ValueError, match=r"stages must be numbers in 1\.\.2, in a list; got 1"):
        nested(main, aux, stages=1)
    with pytest.raises(ValueError, match=r"depth must be on meta, as the inputs are; got cpu"):
        nested(main.to("meta"), aux.to("meta"), depth=torch.tensor([0, 1, 2]))


def test_bad_construction():
    main, aux, fusions = parts("mlp", 2)
    gate = choosing([0], 3)
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        NestedFusion(gate, main, aux[:1], fusions)
    with pytest.raises(ValueError, match="at least one; got 0, 0 and 0"):
        NestedFusion(gate, [], [], [])
    with pytest.raises(ValueError, match=r"aux stage 1.*inputs"):
        NestedFusion(gate, main, [Branch(aux[0], inputs="x"), aux[1]], fusions)
    with pytest.raises(ValueError, match="NestedFusion: execution must be one of"):
        NestedFusion(gate, main, aux, fusions, execution="fast")


@pytest.mark.parametrize("depths", [[1, 2, 1], [2, 2, 2]])
def test_a_fusion_that_ignores_the_main_stream_leaves_it_zeros(depths):
    """As masked; also where both streams were sorted in one call."""
    main = [nn.Identity(), mlp(CHANNELS, CHANNELS)]
    aux, fusions = [mlp(CHANNELS, CHANNELS) for _ in range(2)], [SecondOf(), SecondOf()]
    gate = choosing(depths, 3).requires_grad_(False)
    nested = NestedFusion(gate, main, aux, fusions, execution="routed")
    expected = masked_nested(gate, main, aux, fusions, mode="none")
    modules, inputs = [*main, *aux], batch("mlp", 3)
    assert_same(backward(nested, modules, inputs), backward(expected, modules, inputs))


class SecondOf(nn.Module):
    """A fusion that replaces the main stream."""

    def forward(self, main, aux):
        return aux
