"""Ways to decide: the k best, any, a threshold, at random; what they cost and how often."""

import copy
import math

import pytest
import torch
from models import FixedGate, Function, assert_close, assert_masked, blend, mlp, toy
from torch import Tensor, nn

from dynmm_kernels import (
    Branch,
    ChainedFusion,
    NestedFusion,
    RoutedFusion,
    resource_loss,
    route,
)
from dynmm_kernels.nn import ConfidenceGate, Usage, exponential_temperature
from dynmm_kernels.nn.stacks.stage import Stage

N, B, FEATURES = 9, 4, 5
SELECTS = [2, 3, 4, "multi_hot"]

for_selects = pytest.mark.parametrize("select", SELECTS)
for_modes = pytest.mark.parametrize("mode", ["straight_through", "selected", "none"])


def parts(size: int = N) -> tuple[nn.Module, list[nn.Module], Tensor]:
    x = torch.randn(size, FEATURES, dtype=torch.float64)
    return mlp(B, FEATURES), [mlp(3, FEATURES) for _ in range(B)], x


def weights_of(logits: Tensor, select, mode: str, temperature: float = 1.0) -> Tensor:
    """[N, B], written out sample by sample."""
    rows = []
    for row in logits:
        if select == "multi_hot":
            p = torch.sigmoid(row / temperature)
            hard = (row > 0).to(p.dtype)
            w = hard - p.detach() + p
            if mode == "selected":
                w = torch.where(hard > 0, w, torch.zeros_like(w))
        else:
            best = sorted(range(len(row)), key=lambda b: -float(row[b].detach()))[:select]
            soft = torch.softmax(torch.stack([row[b] for b in best]) / temperature, 0)
            w = torch.stack(
                [soft[best.index(b)] if b in best else row.new_zeros(()) for b in range(len(row))]
            )
        rows.append(w.detach() if mode == "none" else w)
    return torch.stack(rows)


@for_selects
@for_modes
@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_select_is_the_formula(select, mode, execution, temperature, backend):
    gate, branches, x = parts()
    settings = {"execution": execution, "gate_grad": mode, "temperature": temperature}
    fusion = RoutedFusion(gate, branches, select=select, **settings)

    def formula(x):
        weights = weights_of(gate(x), select, mode, temperature)
        return blend(weights, [branch(x) for branch in branches])

    assert_masked(fusion, formula, [gate, *branches], (x,))


@for_selects
def test_routed_runs_only_what_is_selected(select, backend):
    _, branches, x = parts()
    logits = torch.randn(N, B, dtype=torch.float64)
    fusion = RoutedFusion(FixedGate(logits), branches, select=select, execution="routed").eval()
    seen = []
    for branch in branches:
        branch.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        _, routing = fusion(x, return_routing=True)
    wanted = (weights_of(logits, select, "none") != 0).sum(0).tolist()
    assert seen == [count for count in wanted if count]
    assert list(routing.counts) == wanted == routing.device_counts.tolist()
    assert routing.rows_run == tuple(wanted)
    assert_close(routing.weights, weights_of(logits, select, "none"))


def test_multi_hot_without_any_branch_is_zero(backend):
    _, branches, x = parts(3)
    logits = torch.tensor([[-1.0] * B, [1.0, -1, -1, -1], [0.0] * B], dtype=torch.float64)
    for execution in ("routed", "masked"):
        fusion = RoutedFusion(FixedGate(logits), branches, select="multi_hot", execution=execution)
        out = fusion(x)
        assert (out[0] == 0).all()
        assert (out[2] == 0).all(), "a logit of 0 is not positive"
        assert_close(out[1], branches[0](x[1:2])[0])
        fusion.gate = Branch(FixedGate(-torch.ones(3, B, dtype=torch.float64)))
        assert (fusion(x) == 0).all()


@for_selects
def test_dense_weighs_by_probability(select):
    gate, branches, x = parts()
    fusion = RoutedFusion(gate, branches, select=select, execution="dense")
    logits = gate(x)
    probs = logits.sigmoid() if select == "multi_hot" else logits.softmax(1)
    assert_close(fusion(x), blend(probs, [branch(x) for branch in branches]))


def test_a_closed_branch_is_never_weighted(backend):
    _, branches, x = parts(2)
    logits = torch.tensor([[0.0, -math.inf, 1, -math.inf]] * 2, dtype=torch.float64)
    expected = blend(logits.softmax(1), [branch(x) for branch in branches])
    for execution in ("routed", "masked"):
        assert_close(
            RoutedFusion(FixedGate(logits), branches, select=3, execution=execution)(x), expected
        )


@for_selects
@pytest.mark.parametrize("row", [0, 4])
def test_undefined_logits_are_named(select, row, call, backend):
    _, branches, x = parts()
    logits = torch.randn(N, B, dtype=torch.float64)
    logits[row, 1] = math.nan
    fusion = RoutedFusion(FixedGate(logits), branches, select=select)
    with pytest.raises(ValueError, match=rf"row {row} \(1 such rows"):
        call(fusion, x)


def test_noise_draws_by_the_probabilities():
    """multi_hot: logistic noise takes a branch with the probability of its sigmoid."""
    size = 20_000
    logits = torch.tensor([[1.0, -0.5, 0.0]]).expand(size, 3)
    branches = [Function(lambda x: x) for _ in range(3)]
    fusion = RoutedFusion(FixedGate(logits), branches, select="multi_hot", noise="gumbel")
    _, routing = fusion(torch.randn(size, 2), return_routing=True)
    shares = torch.tensor(routing.fractions)
    assert torch.allclose(shares, logits[0].sigmoid(), atol=0.02)
    _, routing = fusion.eval()(torch.randn(size, 2), return_routing=True)
    assert routing.fractions == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("graph", [True, False])
def test_noise_in_training_needs_no_graph(graph):
    branches = [Function(lambda x: x * 0), Function(lambda x: x * 0 + 1)]
    fusion = RoutedFusion(FixedGate(torch.zeros(2000, 2)), branches, noise="gumbel")
    with torch.set_grad_enabled(graph):
        assert 0.4 < fusion(torch.ones(2000, 1)).mean().item() < 0.6
        assert not fusion.eval()(torch.ones(2000, 1)).any()


@pytest.mark.parametrize("graph", [True, False])
def test_noise_in_eval_where_it_is_wanted(graph):
    branches = [Function(lambda x: x * 0), Function(lambda x: x * 0 + 1)]
    fusion = RoutedFusion(FixedGate(torch.zeros(2000, 2)), branches, noise="gumbel_always").eval()
    with torch.set_grad_enabled(graph):
        share = fusion(torch.ones(2000, 1)).mean().item()
        assert 0.4 < share < 0.6
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        first, second = (fusion(torch.ones(2000, 1), generator=g) for g in generators)
    assert torch.equal(first, second)


@pytest.mark.parametrize("select", [0, -1, True, 1.0, "multi", None])
def test_select_of_another_kind(select):
    with pytest.raises(ValueError, match="select must be a number of branches or 'multi_hot'"):
        RoutedFusion(*toy(2), select=select)


def test_more_than_there_are():
    with pytest.raises(ValueError, match="select=3 of only 2 branches"):
        RoutedFusion(*toy(2), select=3)
    fusion = RoutedFusion(*toy(2))
    with pytest.raises(ValueError, match="select=3 of only 2 branches"):
        fusion.select = 3


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("learning", [True, False])
def test_integers_of_several_branches_are_summed(learning, execution, backend):
    logits = torch.tensor([[1.0, 1, 1], [1, -1, 1]], dtype=torch.float64)

    def branch(value):
        return Function(lambda x: {"y": x * value, "i": torch.full((len(x),), value)})

    gate = FixedGate(logits, requires_grad=learning)
    branches = [branch(value) for value in (1, 10, 100)]
    fusion = RoutedFusion(gate, branches, select="multi_hot", execution=execution)
    assert fusion(torch.zeros(2, 1))["i"].tolist() == [111, 101]
    fusion.branches[0] = Branch(Function(lambda x: {"y": x, "i": x[:, 0] > 0}), name="b")
    for k in (1, 2):
        fusion.branches[k] = Branch(fusion.branches[0].module, name=str(k))
    with pytest.raises(TypeError, match="bool outputs"):
        fusion(torch.zeros(2, 1))


@pytest.mark.parametrize("select", [1, 2])
def test_low_temperature_in_half_precision(select):
    logits = (torch.tensor([[100.0, 99, -100]] * 4)).half()
    branches = [Function(lambda x, b=b: x * 0 + b) for b in range(3)]
    for execution in ("routed", "masked", "dense"):
        gate = FixedGate(logits)
        fusion = RoutedFusion(gate, branches, select=select, execution=execution, temperature=1e-3)
        out = fusion(torch.zeros(4, 1))
        assert (out == 0).all()
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in gate.parameters())


@for_selects
def test_forced_choice_is_one_branch(select):
    gate, branches, x = parts()
    fusion = RoutedFusion(gate, branches, select=select)
    out, routing = fusion(x, choice=2, return_routing=True)
    assert_close(out, branches[2](x))
    assert routing.weights.tolist() == [[0, 0, 1, 0]] * N


@for_selects
def test_copies_and_state(select):
    gate, branches, x = parts()
    fusion = RoutedFusion(gate, branches, select=select)
    assert_close(copy.deepcopy(fusion)(x), fusion(x))
    assert fusion.state_dict().keys() == RoutedFusion(gate, branches).state_dict().keys()


@pytest.mark.parametrize("execution", ["routed", "masked", "dense"])
def test_random_choice(execution):
    """Stage I of DynMM: the gate is not asked and learns nothing; every branch equally likely."""
    gate, branches, x = parts(4000)
    gate.register_forward_pre_hook(lambda *_: pytest.fail("the gate ran"))
    fusion = RoutedFusion(gate, branches, execution=execution)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    out, routing = fusion(x, choice="random", return_routing=True, generator=generators[0])
    assert all(abs(share - 0.25) < 0.03 for share in routing.fractions)
    assert torch.equal(out, fusion(x, choice="random", generator=generators[1]))
    assert_close(out, fusion(x, choice=routing.choice))


def test_uniform_is_the_mean():
    gate, branches, x = parts()
    fusion = RoutedFusion(gate, branches, execution="routed")
    out, routing = fusion(x, choice="uniform", return_routing=True)
    assert_close(out, torch.stack([branch(x) for branch in branches]).mean(0))
    assert routing.choice is None
    assert (routing.weights == 1 / B).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_uniform_computes_no_wider_than_its_inputs(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(3, 2, dtype=dtype)
    fusion = RoutedFusion(nn.Identity(), [nn.Identity(), nn.Identity()])
    output, routing = fusion(x, choice="uniform", return_routing=True)
    assert (output.dtype, routing.probs.dtype) == (dtype, wide)
    stages = [nn.Identity() for _ in range(2)]
    nested = NestedFusion(nn.Identity(), stages[:1], stages[1:], [Function(lambda r, a: r)])
    output, routing = nested(x, x, depth="uniform", return_routing=True)
    assert (output.dtype, routing.probs.dtype) == (dtype, wide)


def test_random_and_uniform_depth():
    stages = [Function(lambda x: x + 1) for _ in range(4)]
    fusions = [Function(lambda r, a: r + 10 * a)] * 2
    nested = NestedFusion(nn.Identity(), stages[:2], stages[2:], fusions)
    main, aux = torch.zeros(3000, 1), torch.zeros(3000, 1)
    _, routing = nested(main, aux, depth="random", return_routing=True)
    assert all(abs(share - 1 / 3) < 0.04 for share in routing.fractions)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    nested.main_stages[0] = Stage(Function(lambda x: x + 1.0), name="main stage 1")
    nested.aux_stages[0] = Stage(Function(lambda x: x + 1.0), name="aux stage 1")
    assert torch.allclose(nested(ids, ids, depth="uniform"), torch.tensor(2 + 2 / 3 * 10 + 20 / 3))
    # Fused in stage 1 by the weight of depths 1 and 2, in stage 2 by that of depth 2.
    assert torch.allclose(
        nested(main, aux, depth="uniform"), torch.tensor(2 + 2 / 3 * 10 + 1 / 3 * 20)
    )


@pytest.mark.parametrize("name", ["other", "Random", ""])
def test_other_words_are_refused(name):
    gate, branches, x = parts()
    with pytest.raises(TypeError, match=f"'random' or 'uniform'; got '{name}'"):
        RoutedFusion(gate, branches)(x, choice=name)


CONFIDENT = {
    "probability": lambda p, scores: max(p) >= 0.6,
    "entropy": lambda p, scores: -sum(q * math.log(q) for q in p) <= 0.8,
    "energy": lambda p, scores: math.log(sum(math.exp(s) for s in scores)) >= 1.2,
}


@pytest.mark.parametrize(
    ("measure", "threshold"), [("probability", 0.6), ("entropy", 0.8), ("energy", 1.2)]
)
def test_confidence(measure, threshold):
    scores = torch.randn(200, 3, dtype=torch.float64) * 1.5
    gate = ConfidenceGate(Function(lambda x: scores), threshold, measure)
    fusion = RoutedFusion(gate, [nn.Identity(), nn.Identity()], gate_grad="none")
    _, routing = fusion(torch.zeros(200, 1), return_routing=True)
    stops = [
        CONFIDENT[measure](p, s)
        for p, s in zip(scores.softmax(1).tolist(), scores.tolist(), strict=True)
    ]
    assert 20 < sum(stops) < 180
    assert (routing.choice == 0).tolist() == stops


@pytest.mark.parametrize("scores", [[1000.0, 0.0], [0.0, -math.inf]])
def test_entropy_of_a_certain_sample_is_zero(scores):
    gate = ConfidenceGate(Function(lambda x: x), 0.1, "entropy")
    given = torch.tensor([scores], requires_grad=True)
    logits = gate(given)
    assert logits.argmax(1).item() == 0
    logits.sum().backward()
    assert given.grad.isfinite().all()


def test_confidence_knows_its_measures():
    with pytest.raises(ValueError, match="measure must be one of 'probability'"):
        ConfidenceGate(nn.Identity(), 0.5, "max")


def test_confidence_in_a_chain():
    """A confident sample is dropped."""
    scores = Function(lambda m, a: torch.cat([m, -m], 1))
    one = [nn.Identity()]
    chain = ChainedFusion([ConfidenceGate(scores, 0.9)], one, one, [Function(lambda r, a: r + a)])
    main = torch.tensor([[0.0], [5.0]])
    assert chain(main, torch.ones(2, 1)).tolist() == [[1.0], [5.0]]


def test_temperature():
    assert exponential_temperature(0, 500) == 1.0
    assert math.isclose(exponential_temperature(500, 500), 1e-3)
    assert math.isclose(exponential_temperature(250, 500), 1e-1**1.5)
    assert exponential_temperature(600, 500) == exponential_temperature(500, 500)
    assert exponential_temperature(-5, 500) == 1.0
    ratios = [
        exponential_temperature(e + 1, 7, 2.0, 0.5) / exponential_temperature(e, 7, 2.0, 0.5)
        for e in range(7)
    ]
    assert max(ratios) - min(ratios) < 1e-12
    with pytest.raises(ValueError, match="epochs=0"):
        exponential_temperature(1, 0)


def costed(select=1, execution="auto") -> tuple[RoutedFusion, Tensor]:
    gate, branches, x = parts()
    named = [Branch(branch, cost=float(10**b)) for b, branch in enumerate(branches)]
    return RoutedFusion(Branch(gate, cost=0.5), named, select=select, execution=execution), x


def test_usage_adds_up():
    fusion, x = costed()
    usage, choices, executed, expected = Usage(), [], 0.0, 0.0
    for size in (9, 4, 1):
        _, routing = fusion(x[:size], return_routing=True)
        usage.add(routing)
        choices += routing.choice.tolist()
        executed += size * routing.executed_cost
        expected += size * float(routing.expected_cost)
    report = usage.read()
    assert report.samples == 14
    assert report.counts == tuple(choices.count(b) for b in range(B))
    assert math.isclose(sum(report.fractions), 1)
    assert math.isclose(report.executed_cost, executed / 14)
    assert math.isclose(report.expected_cost, expected / 14)
    assert copy.deepcopy(usage).read() == report
    _, empty = fusion(x[:0], return_routing=True)
    usage.add(empty)
    assert usage.read() == report
    assert float(resource_loss(empty)) == 0
    assert float(empty.expected_cost) == 0.5
    usage.reset()
    assert usage.read() == (0, (), (), None, None)
    usage.add(routing)
    assert usage.read()[3:] == (routing.executed_cost, pytest.approx(float(routing.expected_cost)))


def test_usage_without_costs_and_of_a_dense_run():
    gate, branches, x = parts()
    usage = Usage()
    for execution in ("routed", "dense"):
        fusion = RoutedFusion(gate, branches, execution=execution)
        usage.add(fusion(x, return_routing=True)[1])
    report = usage.read()
    assert report.executed_cost is None
    assert report.expected_cost is None
    assert sum(report.counts) == N + N * B
    with pytest.raises(ValueError, match="wanted a routing over 4 branches"):
        usage.add(RoutedFusion(*toy(2))(torch.randn(3, 6).double(), return_routing=True)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_costs_in_half_precision(dtype):
    """Costs are counted in billions, which half precision neither holds nor adds up."""
    costs = [1e9, 7e10]
    fusion = RoutedFusion(
        FixedGate(torch.randn(64, 2).to(dtype)),
        [Branch(nn.Identity(), cost=cost) for cost in costs],
    )
    usage = Usage()
    for _ in range(100):
        _, routing = fusion(torch.zeros(64, 1), return_routing=True)
        usage.add(routing)
    expected = routing.probs.detach().double().mean(0) @ torch.tensor(costs).double()
    hard = sum(n * cost for n, cost in zip(routing.counts, costs, strict=True)) / 64
    assert math.isclose(float(routing.expected_cost), float(expected), rel_tol=1e-5)
    assert math.isclose(usage.read().expected_cost, float(expected), rel_tol=1e-5)
    loss = resource_loss(routing)
    assert math.isclose(float(loss), hard, rel_tol=1e-2 if dtype == torch.bfloat16 else 1e-3)
    (loss / 1e9).backward()
    assert fusion.gate.module.logits.grad.isfinite().all()


def test_usage_of_depths():
    stages = [nn.Identity() for _ in range(4)]
    nested = NestedFusion(nn.Identity(), stages[:2], stages[2:], [Function(lambda r, a: r)] * 2)
    depth = torch.tensor([0, 2, 2, 1, 0, 2])
    _, routing = nested(torch.zeros(6, 1), torch.zeros(6, 1), depth=depth, return_routing=True)
    usage = Usage()
    usage.add(routing)
    assert usage.read().counts == (2, 1, 3) == routing.counts


def test_usage_does_not_wait(monkeypatch):
    fusion, x = costed()
    _, routing = fusion(x, return_routing=True)
    usage = Usage()
    for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("waited for the device"))
    usage.add(routing)


def chosen(choice: list[int], forced: bool = False, **settings):
    """The routing of a gate over three branches that decides so, or is made to."""
    gate = FixedGate(nn.functional.one_hot(torch.tensor(choice), 3).float() * 5)
    fusion = RoutedFusion(gate, [nn.Identity()] * 3, **settings)
    given = {"choice": torch.tensor(choice)} if forced else {}
    return fusion(torch.zeros(len(choice), 1), return_routing=True, **given)[1]


def test_usage_warns_of_a_forgotten_branch_once_per_window(recwarn):
    usage = Usage(window=8)
    for _ in range(2):
        usage.add(chosen([0, 2, 0]))
        usage.read()
    assert not recwarn.list  # the window is not full
    usage.add(chosen([0, 0]))
    with pytest.warns(UserWarning, match=r"chose branch 1 for none of 8 samples.*balance_loss"):
        usage.read()
    usage.read()
    usage.add(chosen([0, 0, 2, 2, 1, 0, 0]))
    usage.add(chosen([0, 0]))
    usage.read()  # in this window all are in use
    assert not recwarn.list
    usage.add(chosen([1] * 20))
    with pytest.warns(UserWarning, match=r"chose branch 0, 2 for none of 20 samples"):
        usage.read()
    usage.add(chosen([1] * 7))
    usage.reset()
    usage.add(chosen([1] * 7))
    usage.read()
    assert not recwarn.list


def test_usage_warns_of_forgotten_depths():
    stages = [nn.Identity() for _ in range(4)]
    gate = FixedGate(torch.tensor([[0.0, 5.0, 0.0]]).repeat(4, 1))
    nested = NestedFusion(gate, stages[:2], stages[2:], [Function(lambda r, a: r)] * 2)
    usage = Usage(window=4)
    usage.add(nested(torch.zeros(4, 1), torch.zeros(4, 1), return_routing=True)[1])
    with pytest.warns(UserWarning, match=r"chose depth 0, 2 for none of 4 samples"):
        usage.read()


def test_usage_does_not_warn_of_what_no_gate_chose(recwarn):
    usage, silent = Usage(window=4), Usage(window=None)
    usage.add(chosen([0] * 9, forced=True))
    usage.add(chosen([0] * 9, execution="dense"))
    silent.add(chosen([0] * 9))
    assert usage.read().samples == 18
    assert silent.read().counts == (9, 0, 0)
    assert not recwarn.list


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_usage_needs_a_window_of_samples(window):
    with pytest.raises(ValueError, match=f"window must be .* got {window}"):
        Usage(window=window)


@for_selects
def test_cost_of_what_is_selected(select):
    fusion, x = costed(select)
    fusion.eval()
    _, routing = fusion(x, return_routing=True)
    table = [1.0, 10.0, 100.0, 1000.0]
    weights = weights_of(fusion.gate.module(x), select, "none")
    expected = sum(w * c for row in weights.tolist() for w, c in zip(row, table, strict=True)) / N
    assert math.isclose(float(resource_loss(routing)), expected)


def test_loss_forms():
    fusion, x = costed()
    _, routing = fusion(x, return_routing=True)
    whole = resource_loss(routing)
    assert_close(resource_loss(routing, reduction="mean"), whole / B)
    assert_close(resource_loss([routing, routing]), 2 * whole)
    mixed = resource_loss([routing, routing], [None, [0, 0, 0, 1]])
    assert_close(mixed, whole + routing.weights[:, 3].mean())
    assert float(resource_loss([routing, routing], budget=2 * float(whole) + 1)) == 0
    assert_close(resource_loss(routing, reduction="mean", budget=0.0), whole / B)
    with pytest.raises(ValueError, match="'sum' or 'mean'; got 'max'"):
        resource_loss(routing, reduction="max")
    with pytest.raises(ValueError, match="one list of costs per routing"):
        resource_loss([routing], [None, None])
    with pytest.raises(ValueError, match="at least one"):
        resource_loss([])
    with pytest.raises(ValueError, match="a list of costs for every routing"):
        resource_loss([routing, routing], [0, 1])


def test_plans_of_several_branches_per_sample_are_those_of_route(backend):
    logits = torch.randn(N, B)
    branches = [nn.Identity() for _ in range(B)]
    fusion = RoutedFusion(FixedGate(logits), branches, select="multi_hot")
    _, routing = fusion(torch.zeros(N, 1), return_routing=True)
    assert torch.equal(routing.plan.inverse, route(logits > 0, B).inverse)
