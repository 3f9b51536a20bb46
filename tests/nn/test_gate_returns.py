"""What a gate returns: logits, probabilities, or weights that it drew itself."""

import copy
import math
import warnings

import pytest
import stacks
import torch
import torch.nn.functional as F
from models import FixedGate, Function, assert_close, assert_masked, assert_same, backward, blend
from test_cells import FUSING
from test_chained import MODES, RULES, WISHES, wishing
from test_chained import build as build_chain
from test_gates import B, parts
from test_nested import PATTERNS
from test_nested import build as build_nested
from torch import Tensor, nn

from dynmm_kernels import ChainedFusion, NestedFusion, RoutedFusion

TAU = 0.7
OTHER = 0.3  # a temperature that must not matter

for_modes = pytest.mark.parametrize("mode", MODES)
for_executions = pytest.mark.parametrize("execution", ["routed", "masked"])
for_all_executions = pytest.mark.parametrize("execution", ["routed", "masked", "dense"])


def through(hard: Tensor, soft: Tensor) -> Tensor:
    return hard.to(soft.dtype) - soft.detach() + soft


def best(z: Tensor, k: int) -> Tensor:
    return torch.zeros_like(z).scatter(1, z.topk(k).indices, 1)


def gumbel(z: Tensor) -> Tensor:
    """The same draw at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        return F.gumbel_softmax(z, tau=TAU, hard=True)


SOFT = {"softmax": lambda z: z.softmax(1), "sigmoid": torch.sigmoid}
DRAWN = {
    "gumbel": gumbel,
    "perhaps": lambda z: through(gumbel(z).detach() * (z > z.mean(0))[:, :1], z.sigmoid()),
    "straight": lambda z: through(best(z, 1), (z / TAU).softmax(1)),
    "top two": lambda z: through(best(z, 2), z.softmax(1)),
    "policy": lambda z: through(z > z.mean(0), z.sigmoid()),
}
FORMS = {"logits": lambda z: z, **SOFT, **DRAWN}
CASES = [
    *(("probabilities", select, "softmax") for select in (1, 2, B)),
    ("probabilities", "multi_hot", "sigmoid"),
    *(("weights", 1, form) for form in ("gumbel", "perhaps", "straight")),
    *(("weights", select, form) for select in (2, "multi_hot") for form in ("top two", "policy")),
]
for_cases = pytest.mark.parametrize(("returns", "select", "form"), CASES)


class Returning(nn.Module):
    """A gate that makes `form` of its logits."""

    def __init__(self, gate: nn.Module, form: str):
        super().__init__()
        self.gate, self.form = gate, form

    def forward(self, *inputs):
        return FORMS[self.form](self.gate(*inputs))


def weights_of(returns: str, came: Tensor, select, mode: str) -> Tensor:
    """[N, B], as the masked formula weighs the branches."""
    if returns == "weights" or mode == "dense":
        hard = weights = came
    elif select in (1, "multi_hot"):
        hard = best(came, 1) if select == 1 else came.detach() > 0.5
        weights = through(hard, came)
    else:
        hard = best(came, select)
        weights = came * hard / (came * hard).sum(1, keepdim=True)
    if mode == "selected":
        weights = torch.where(hard > 0.5, weights, torch.zeros_like(weights))
    return weights.detach() if mode == "none" else weights


def formula_of(gate, branches, returns, select=1, mode="straight_through"):
    def formula(x):
        weights = weights_of(returns, gate(x), select, mode)
        return blend(weights, [branch(x) for branch in branches])

    return formula


RUNS = [*((execution, mode) for execution in ("routed", "masked") for mode in MODES)]
for_runs = pytest.mark.parametrize(("execution", "mode"), [*RUNS, ("dense", "dense")])


def settings_of(execution, mode, returns):
    grad = "straight_through" if mode == "dense" else mode
    own = {"gate_returns": returns, "temperature": OTHER}
    return {"execution": execution, "gate_grad": grad, **own}


@for_cases
@for_runs
def test_is_the_formula(execution, mode, returns, select, form, backend):
    gate, branches, x = parts(13)
    gate = Returning(gate, form)
    fusion = RoutedFusion(gate, branches, select=select, **settings_of(execution, mode, returns))
    formula = formula_of(gate, branches, returns, select, mode)
    assert_masked(fusion, formula, [gate, *branches], (x,))


@pytest.mark.parametrize("select", [1, 2, "multi_hot"])
@pytest.mark.parametrize(("noise", "temperature"), [(None, 1.0), ("gumbel", OTHER)])
@for_modes
def test_probabilities_are_what_their_logits_are(mode, noise, temperature, select):
    """With noise they are logits again, with a temperature."""
    gate, branches, x = parts()
    settings = {"select": select, "noise": noise, "temperature": temperature, "gate_grad": mode}
    likely = Returning(gate, "sigmoid" if select == "multi_hot" else "softmax")
    results = []
    for asked, returns in ((gate, "logits"), (likely, "probabilities")):
        fusion = RoutedFusion(asked, branches, gate_returns=returns, **settings)
        draws = torch.Generator().manual_seed(3)
        call = Function(lambda x, f=fusion, g=draws: f(x, generator=g))
        results.append(backward(call, [gate, *branches], (x,)))
    assert_same(results[1], results[0])


@for_cases
def test_reports(returns, select, form):
    gate, branches, x = parts()
    gate = Returning(gate, form)
    fusion = RoutedFusion(gate, branches, select=select, gate_returns=returns, execution="routed")
    _, routing = fusion(x, return_routing=True)
    wanted = weights_of(returns, gate(x), select, "none")
    assert_close(routing.weights.detach(), wanted)
    assert list(routing.counts) == (wanted > 1e-6).sum(0).tolist()
    if returns == "probabilities":
        assert_close(routing.probs.detach(), gate(x).detach())


TIES = [([0.25] * 4, 1, 0), ([0.1, 0.4, 0.1, 0.4], 1, 1), ([0.5, 0.5, 0.6, 0], "multi_hot", 2)]


@pytest.mark.parametrize(("row", "select", "branch"), [*TIES, ([0.1, 0.2, 0.3, 0.415], 1, 3)])
@for_executions
def test_ties_and_sums_of_almost_one(row, select, branch, execution, call):
    fusion, (x,) = fusion_of(RoutedFusion, row, "probabilities", select, execution=execution)
    assert_close(call(fusion, x), fusion.branches[branch].module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_other_precision(dtype, call):
    _, branches, x = parts(64)
    gate = Returning(FixedGate(torch.randn(64, B).to(dtype)), "gumbel")
    fusion = RoutedFusion(gate, branches, gate_returns="weights", execution="routed")
    wanted = blend(gate().double().round(), [branch(x) for branch in branches])
    assert_close(call(fusion, x).double(), wanted, 0.02)


@pytest.mark.parametrize("returns", ["probabilities", "weights"])
@pytest.mark.parametrize("choice", [2, "uniform"])
def test_forced_choice_asks_nobody(choice, returns):
    _, branches, x = parts()
    fusion = RoutedFusion(Function(lambda x: pytest.fail("the gate ran")), branches)
    expected = fusion(x, choice=choice)
    fusion.gate_returns = returns
    assert_close(fusion(x, choice=choice), expected)


@for_executions
def test_changed_between_calls(execution):
    gate, branches, x = parts()
    fusion = RoutedFusion(Returning(gate, "logits"), branches, execution=execution)
    assert fusion.gate_returns == "logits"
    forms = {"logits": "logits", "probabilities": "softmax", "weights": "gumbel"}
    for returns in ("weights", "logits", "probabilities", "weights", "probabilities", "logits"):
        fusion.gate_returns, fusion.gate.module.form = returns, forms[returns]
        form, same = ("gumbel", returns) if returns == "weights" else ("softmax", "probabilities")
        formula = formula_of(Returning(gate, form), branches, same)
        assert_masked(fusion.train(), formula, [gate, *branches], (x,))
        assert_close(copy.deepcopy(fusion)(x), formula(x))


for_returns = pytest.mark.parametrize("returns", ["probabilities", "weights"])
# The formula on logits, with the temperature of the softmax in the gate.
STACK_FORMS = {"probabilities": ("softmax", 1.0), "weights": ("straight", TAU)}


def masked_settings(mode, returns):
    mode = "straight_through" if (mode, returns) == ("dense", "weights") else mode
    return {"mode": mode, "temperature": STACK_FORMS[returns][1]}


@pytest.mark.parametrize("plan", ["mixed", "all 0", "one depth", "one sample"])
@for_returns
@for_runs
def test_nested(execution, mode, returns, plan, backend):
    gate, pieces, _ = build_nested("mlp", PATTERNS[plan])
    asked = Returning(gate, STACK_FORMS[returns][0])
    fusion = NestedFusion(asked, *pieces, **settings_of(execution, mode, returns))
    reference = stacks.masked_nested(gate, *pieces, **masked_settings(mode, returns))
    inputs = stacks.batch("mlp", len(PATTERNS[plan]))
    assert_masked(fusion, reference, stacks.modules_of(gate, *pieces), inputs)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("plan", ["dynamic", "static between", "2122"])
@for_returns
@for_runs
def test_chained(execution, mode, returns, plan, independent, backend):
    cells = {"rules": {**RULES, **FUSING}[plan], "independent": independent}
    gates, pieces, _ = build_chain("mlp", cells["rules"])
    asked = [gate and Returning(gate, STACK_FORMS[returns][0]) for gate in gates]
    fusion = ChainedFusion(asked, *pieces, **settings_of(execution, mode, returns), **cells)
    reference = stacks.masked_chain(gates, *pieces, **masked_settings(mode, returns), **cells)
    inputs = wishing("mlp", WISHES["twice"])
    assert_masked(fusion, reference, stacks.modules_of(gates, *pieces), inputs)


def fusion_of(kind, row, returns="logits", select=1, learns=True, **settings):
    """A fusion whose only gate returns this row for each of three samples, and its inputs."""
    gate = FixedGate(torch.tensor([row] * 3, dtype=torch.float64), learns)
    settings["gate_returns"] = returns
    if kind is RoutedFusion:
        _, branches, x = parts(3)
        return kind(gate, branches[: len(row)], select=select, **settings), (x,)
    inputs = stacks.batch("mlp", 3)
    if kind is NestedFusion:
        return kind(gate, *stacks.parts("mlp", len(row) - 1), **settings), inputs
    rules = ["fuse", "dynamic"]
    return kind([None, gate], *stacks.parts("mlp", 2), rules=rules, **settings), inputs


KINDS = [RoutedFusion, NestedFusion, ChainedFusion]
ROWS = [
    *(("probabilities", row, 1) for row in ([-0.25, 1.25], [0.5, 0.53], [0.5, 0.47])),
    *(("probabilities", row, "multi_hot") for row in ([0.1, 1.5], [-0.5, 0.3], [math.nan, 0.3])),
    *(("weights", row, 1) for row in ([0.5, 0], [1.0, 1], [-1.0, 1], [math.nan, 1])),
    *(("weights", row, "multi_hot") for row in ([2.0, 0], [1.0, 0.5], [math.nan, 1])),
    ("probabilities", [math.nan, 1], 1),
    ("probabilities", [0.5, 0.6], 2),
]
BAD = [(RoutedFusion, *case) for case in ROWS]
BAD += [(kind, *case) for kind in KINDS[1:] for case in ROWS if case[2] == 1]
BAD += [(kind, "weights", [0.0, 0], 1) for kind in KINDS[1:]]


@pytest.mark.parametrize(("kind", "returns", "row", "select"), BAD)
@for_all_executions
def test_bad_rows_are_named(kind, returns, row, select, execution, call):
    fusion, inputs = fusion_of(kind, row, returns, select, execution=execution)
    with pytest.raises(ValueError, match="nan" if math.isnan(row[0]) else returns) as caught:
        call(fusion, *inputs)
    name = "gate 2" if kind is ChainedFusion else "gate"
    assert name in str(caught.value).replace("gate_returns", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", ["gumbel", "gumbel_always"])
def test_weights_with_noise(noise, kind, call):
    fusion, inputs = fusion_of(kind, [0.0, 1], "weights", noise=noise)
    with pytest.raises(ValueError, match="noise"):
        call(fusion, *inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["probs", None, "Logits"])
def test_other_values(value, kind):
    wanted = r"gate_returns must be one of 'logits', 'probabilities', 'weights'; got "
    fusion, _ = fusion_of(kind, [0.0, 1])
    with pytest.raises(ValueError, match=wanted):
        fusion.gate_returns = value
    with pytest.raises(ValueError, match=wanted):
        fusion_of(kind, [0.0, 1], value)


def warned(fusion, inputs) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            fusion(*inputs)
    return sum(w.category is UserWarning and "gate_returns" in str(w.message) for w in caught)


@pytest.mark.parametrize("kind", KINDS)
@for_all_executions
def test_probabilities_said_to_be_logits_are_noticed_once(execution, kind):
    fusion, inputs = fusion_of(kind, [0.2, 0.8], execution=execution)
    with torch.no_grad():
        assert warned(fusion, inputs) == 0
    assert [warned(fusion.train(on), inputs) for on in (False, True, True)] == [0, 1, 0]


def test_two_gates_of_a_chain_are_one_fusion():
    gates = [FixedGate(torch.tensor([[0.2, 0.8]] * 3, dtype=torch.float64)) for _ in range(2)]
    assert warned(ChainedFusion(gates, *stacks.parts("mlp", 2)), stacks.batch("mlp", 3)) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [[0.2, 0.9], [-0.2, 1.2], [0.0, 0.0]])
def test_logits_are_no_reason_to_warn(row, kind):
    assert warned(*fusion_of(kind, row)) == 0


@for_all_executions
def test_sigmoids_said_to_be_logits_are_noticed(execution):
    """They would choose every branch for every sample."""
    gate, branches = nn.Linear(6, 3).double(), [nn.Linear(6, 2).double() for _ in range(3)]
    x = torch.randn(4, 6, dtype=torch.float64)
    for squash, count in ((torch.sigmoid, 1), (torch.nn.Identity(), 0), (torch.exp, 0)):
        fusion = RoutedFusion(
            lambda x, squash=squash: squash(gate(x) + 0.5 - x[:, :3]),
            branches,
            select="multi_hot",
            execution=execution,
        )
        assert warned(fusion, (x,)) == count


def test_no_reason_to_warn():
    _, branches, x = parts(3)
    rows = torch.tensor([[0.2, 0.2, 0.3, 0.3]] * 2 + [[0.3] * 4], dtype=torch.float64)
    assert warned(RoutedFusion(FixedGate(rows), branches), (x,)) == 0
    assert warned(*fusion_of(RoutedFusion, [0.2, 0.8], select="multi_hot")) == 0
    for kind in KINDS:
        assert warned(*fusion_of(kind, [0.2, 0.8], learns=False)) == 0
        assert warned(*fusion_of(kind, [0.2, 0.8], "probabilities")) == 0
        assert warned(*fusion_of(kind, [0.0, 1.0], "weights")) == 0
