"""The benchmark models cost what the papers' figures say, and the plans are exact."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines, qmf
from benchmarks.ceilings import ceiling
from benchmarks.contest import Contest, Row
from benchmarks.workloads import (
    IMDB_BATCH_NORM,
    WORKLOADS,
    PlannedGate,
    planned_choice,
    planned_logits,
)
from dynmm_kernels import RoutedFusion, branch_costs
from dynmm_kernels.measure.memory import peak_bytes, saved_bytes
from dynmm_kernels.measure.timing import ONCE


def counted_macs(module, inputs, n):
    """Per sample. Fused attention kernels are not counted on every device, plain ones are."""
    module.eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(inputs)
    return counter.get_total_flops() / 2 / n


@cache
def eval_model(name):
    gate, experts = WORKLOADS[name].make_model(torch.float64, dropout=0.0)
    for module in (gate, *experts.values()):
        module.eval()
    return gate, experts


def prepared(name, n, p):
    """Gate, experts, input (sequences cut to three steps) and the planned choice."""
    gate, experts = eval_model(name)
    choice = planned_choice(n, p)
    x = WORKLOADS[name].make_inputs(n, torch.float64)
    x = tree_map(lambda tensor: tensor[:, :3] if tensor.dim() == 3 else tensor, x)
    return PlannedGate(gate, planned_logits(choice)), experts, x, choice


@pytest.mark.parametrize(
    ("name", "millions"),
    [("imdb", (0.563, 0.690, 10.306)), ("mosei", (10.8, 142.1, 349.5))],
)
def test_costs_are_the_published_ones(name, millions):
    workload = WORKLOADS[name]
    gate, experts = workload.make_model(torch.float32)
    inputs = workload.make_inputs(2, torch.float32)
    batch_norm = {"imdb": (0, 0, IMDB_BATCH_NORM)}.get(name, (0, 0, 0))

    counted = [
        counted_macs(module, inputs, 2) + extra
        for module, extra in zip((gate, *experts.values()), batch_norm, strict=True)
    ]

    assert counted == [workload.costs.gate, *workload.costs.branches]
    digits = 3 if name == "imdb" else 1
    assert tuple(round(macs / 1e6, digits) for macs in counted) == millions


def test_imdb_costs_are_the_authors_constants():
    """The authors' table [1.25261, 10.86908] M is an expert plus the gate."""
    costs = WORKLOADS["imdb"].costs
    assert [round((cost + costs.gate) / 1e6, 5) for cost in costs.branches] == [1.25261, 10.86908]


def qmf_macs(encoder, *inputs):
    """In 1e9, of one sample."""
    return branch_costs(encoder.to("meta"), tuple(x.to("meta") for x in inputs)) / 1e9


@pytest.mark.parametrize(("tokens", "billions"), [(16, 1.36), (32, 2.74), (128, 11.2), (512, 48.3)])
def test_qmf_text_costs_what_bert_base_does(tokens, billions):
    inputs = qmf.texts_and_images(1, shortened=False, tokens=tokens)
    counted = qmf_macs(qmf.TextEncoder(101, 12), inputs["ids"], inputs["mask"])
    assert counted == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(("resnet", "billions"), [("RESNET_18", 1.81), ("RESNET_152", 11.51)])
def test_qmf_images_cost_what_resnets_do(resnet, billions):
    image = torch.empty(1, 3, 224, 224)
    counted = qmf_macs(qmf.ImageEncoder(101, *getattr(qmf, resnet)), image)
    assert counted == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("pair", qmf.PAIRS)
def test_shortened_pairs_keep_their_proportion(pair):
    """Of the first encoder to the second, roughly; and both cost a third at most."""
    paper, short = (qmf.cascade_costs(pair, shortened) for shortened in (False, True))
    first, second = (costs.gate / costs.branches[1] for costs in (paper, short))
    assert second == pytest.approx(first, rel=0.12)
    assert short.gate < paper.gate / 3
    assert short.branches[1] < paper.branches[1] / 3


@pytest.mark.parametrize(
    ("pair", "p", "tokens", "expected"),
    [
        ("text-image", 0.5, 16, 1.81),
        ("text-image", 0.86, 16, 4.3),
        ("text-image", 0.5, 32, 1.68),
        ("rgb-d", 0.5, None, 1.33),
        ("rgb-d", 1.0, None, 2.0),
    ],
)
def test_qmf_ceilings(pair, p, tokens, expected):
    """For texts of 16 tokens, and of the 32 that are timed."""
    costs = qmf.cascade_costs(pair, shortened=False)
    if tokens == 16:
        costs = replace(costs, gate=1.36e9)
    early = round(1000 * p)
    assert ceiling(costs, (early, 1000 - early)) == pytest.approx(expected, rel=0.02)


def test_trivial_costs():
    workload = WORKLOADS["trivial"]
    gate, experts = workload.make_model(torch.float32)
    x = workload.make_inputs(2, torch.float32)
    counted = [counted_macs(module, x, 2) for module in (gate, *experts.values())]
    assert counted == [workload.costs.gate, *workload.costs.branches]


@pytest.mark.parametrize(
    ("name", "p", "gate_grad", "expected"),
    [
        ("imdb", 0.036, None, 7.2),
        ("imdb", 0.681, None, 1.48),
        ("imdb", 0.889, None, 1.18),
        ("mosei", 0.164, None, 2.69),
        ("mosei", 0.646, None, 1.75),
        ("mosei", 0.869, None, 1.51),
        ("mosei", 0.164, "straight_through", 1.72),
        ("mosei", 0.164, "selected", 2.69),
    ],
)
def test_ceilings(name, p, gate_grad, expected):
    active = round(1000 * p)
    value = ceiling(WORKLOADS[name].costs, (1000 - active, active), gate_grad)
    assert round(value, len(str(expected).split(".")[1])) == expected


@pytest.mark.parametrize("n", [0, 1, 2, 31, 32, 128, 1025])
@pytest.mark.parametrize("p", [0.0, 0.036, 0.164, 0.5, 1.0])
def test_planned_choice_is_exact_and_repeatable(n, p):
    choice = planned_choice(n, p)
    assert choice.shape == (n,)
    assert int(choice.sum()) == round(p * n)
    assert torch.equal(choice, planned_choice(n, p))
    assert torch.equal(planned_logits(choice).argmax(1), choice)


def test_planned_gate_pays_for_and_trains_the_real_gate():
    gate, _ = WORKLOADS["imdb"].make_model(torch.float64)
    inputs = WORKLOADS["imdb"].make_inputs(5, torch.float64)
    planned = planned_logits(planned_choice(5, 0.4))
    direction = torch.randn(5, 2, dtype=torch.float64)

    (gate(inputs) * direction).sum().backward()
    expected = [parameter.grad.clone() for parameter in gate.parameters()]
    gate.zero_grad()
    out = PlannedGate(gate, planned)(inputs)
    (out * direction).sum().backward()

    assert torch.equal(out, planned.double())
    for parameter, gradient in zip(gate.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("name", WORKLOADS)
def test_models_are_seeded(name):
    first, second = (WORKLOADS[name].make_model(torch.float32) for _ in range(2))
    for a, b in zip((first[0], *first[1].values()), (second[0], *second[1].values()), strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_baselines_agree(name, p):
    """Per sample: masked, the loop and the bare calls all give the chosen expert's output."""
    gate, experts, x, choice = prepared(name, 5, p)
    with torch.no_grad():
        every = torch.stack([expert(x) for expert in experts.values()], dim=1)
        expected = every[torch.arange(5), choice]
        torch.testing.assert_close(baselines.masked(gate, experts, x), expected)
        torch.testing.assert_close(baselines.handwritten_loop(gate, experts, x), expected)
        bare = baselines.Bare.prepare(gate, experts, x, choice)
        for y, (_, _, rows) in zip(bare.forward(), bare.selected, strict=True):
            torch.testing.assert_close(y, expected[rows])


@pytest.mark.parametrize("name", WORKLOADS)
def test_loop_has_the_selected_gradient(name):
    gate, experts, x, _ = prepared(name, 5, 0.4)
    parameters = [p for module in (gate, *experts.values()) for p in module.parameters()]

    def gradients(out):
        out.square().sum().backward()
        collected = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        return collected

    expected = baselines.masked(gate, experts, x, weigh=baselines.straight_through_selected)
    for g, reference in zip(
        gradients(baselines.handwritten_loop(gate, experts, x)), gradients(expected), strict=True
    ):
        torch.testing.assert_close(g, reference)


def test_a_wrong_row_is_not_timed():
    calls = {"right": 0, "wrong": 0, "unknown": 0}

    def row(name):
        def call():
            calls[name] += 1

        return Row(call, memory={"peak": lambda: 7})

    errors = {"right": 1e-5, "wrong": 1e-3, "unknown": float("nan")}
    outcome = Contest({name: row(name) for name in calls}, errors, tolerance=1e-4).run(ONCE)
    assert calls["right"]
    assert not calls["wrong"] + calls["unknown"]
    assert (list(outcome.seconds), outcome.memory) == (["right"], {"right": {"peak": 7}})


def test_peak_bytes_is_the_most_held_at_once():
    def run():
        first = torch.zeros(1 << 18)
        second = torch.zeros(1 << 16)
        del first
        third = torch.zeros(1 << 17)
        return second, third

    assert peak_bytes(run) == 4 * ((1 << 18) + (1 << 16))


def test_saved_bytes_counts_a_storage_once_and_leaves_out_the_known():
    x = torch.randn(64, 32)
    linear = torch.nn.Linear(32, 16)

    def forward():
        y = linear(x).tanh()  # tanh keeps its output, linear keeps x
        return y * y  # which is kept again

    known = [x, *linear.parameters()]
    assert saved_bytes(forward, known) == 64 * 16 * 4
    assert saved_bytes(forward) == (64 * 16 + 64 * 32) * 4


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize(("name", "size"), [("imdb", 128), ("mosei", 8)])
def test_training_the_gate_alone_keeps_nothing_of_frozen_branches(name, size, execution):
    """What is kept for the backward is the gate's, and the branches' outputs."""
    workload = WORKLOADS[name]
    gate, experts = workload.make_model(torch.float32, dropout=0.0)
    x = workload.make_inputs(size, torch.float32)
    frozen = [expert.eval().requires_grad_(False) for expert in experts.values()]
    fusion = RoutedFusion(gate, frozen, execution=execution)
    known = [*fusion.parameters(), *tree_leaves(x)]
    outputs = sum(expert(x).nbytes for expert in frozen)
    decision = 16 * size * 8  # choice, plan, probabilities and masks: a few numbers a sample
    kept = saved_bytes(lambda: fusion(x), known)
    assert kept <= saved_bytes(lambda: gate(x), known) + 2 * outputs + decision
    fusion(x).sum().backward()
    assert all(p.grad is not None for p in gate.parameters())
    assert all(p.grad is None for expert in frozen for p in expert.parameters())
