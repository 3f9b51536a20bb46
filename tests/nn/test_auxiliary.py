"""Auxiliary losses: 0-dim tensors that branches return beside their rows, summed over who ran."""

import copy

import pytest
import torch
from compiling import GATE_GRADS, Counted, Steered, assert_agree, splits
from models import FEATURES, Function, backward, choosing, hard_weights, mlp
from torch import Tensor, nn

from dynmm_kernels import NestedFusion, RoutedFusion, combine, route
from dynmm_kernels.nn import Add

N, BRANCHES = 6, 3
CHOICES = {"mixed": [0, 2, 1, 0, 1, 2], "starved": [0, 2, 2, 0, 0, 2], "one": [2] * N}


class WithLoss(nn.Module):
    """Rows, and a loss of the rows it was called with."""

    def __init__(self):
        super().__init__()
        self.own = mlp()

    def forward(self, x: Tensor):
        y = self.own(x)
        return {"y": y, "more": (y[:, :1].exp(), y.square().sum() + x.sum())}


def made(choice, **settings):
    torch.manual_seed(0)
    gate = choosing(choice, BRANCHES)
    return RoutedFusion(gate, [WithLoss() for _ in range(BRANCHES)], **settings)


def oracle(fusion, choice, whole: bool, everyone: bool = False, soft: bool = False):
    """By hand: the rows of masked execution, and the loss of each branch that somebody chose."""

    def fuse(x):
        logits = fusion.gate()
        weights = logits.softmax(1) if soft else hard_weights(logits)
        if fusion.gate_grad == "none" and not soft:
            weights = weights.detach()
        y, z, loss = 0.0, 0.0, torch.zeros((), dtype=torch.float64)
        for b, branch in enumerate(fusion.branches):
            weight = weights[:, b : b + 1]
            if fusion.gate_grad == "selected" and not soft:
                chosen = torch.tensor(choice)[:, None] == b
                weight = torch.where(chosen, weight, weight.detach())
            out = branch.module.own(x)
            y, z = y + weight * out, z + weight * out[:, :1].exp()
            mine = [n for n, c in enumerate(choice) if c == b]
            if mine or everyone:
                rows = slice(None) if whole else mine
                loss = loss + out[rows].square().sum() + x[rows].sum()
        return {"y": y, "more": (z, loss)}

    return fuse


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("gate_grad", GATE_GRADS)
@pytest.mark.parametrize("settings", [{}, {"starved": "run"}, {"execution": "masked"}], ids=str)
def test_losses_are_summed_over_the_branches_that_somebody_chose(choice, gate_grad, settings):
    settings = {"execution": "routed", "gate_grad": gate_grad, **settings}
    fusion, x = made(choice, **settings), torch.randn(N, FEATURES, dtype=torch.float64)
    fuse = oracle(fusion, choice, whole=fusion.execution == "masked")
    assert_agree(backward(fusion, [fusion], (x,)), backward(fuse, [fusion], (x,)), 1e-12)
    with torch.no_grad():
        for mode in (True, False):
            out, wanted = fusion.train(mode)(x), fuse(x)
            torch.testing.assert_close(out["y"], wanted["y"])
            torch.testing.assert_close(out["more"], wanted["more"])


def test_dense_counts_every_branch():
    fusion, x = made([0] * N, execution="dense"), torch.randn(N, FEATURES, dtype=torch.float64)
    fuse = oracle(fusion, [0] * N, whole=True, everyone=True, soft=True)
    assert_agree(backward(fusion, [fusion], (x,)), backward(fuse, [fusion], (x,)), 1e-12)


@pytest.mark.parametrize("execution", ["masked", "routed", "auto"])
def test_forced_and_top_k_and_nobody(execution):
    fusion = made([0] * N, execution=execution, select=2)
    x = torch.randn(N, FEATURES, dtype=torch.float64)

    def loss(*taken):
        return sum(fusion.branches[b].module(part)["more"][1] for b, part in taken)

    mask = torch.tensor([[1, 0, 1]] * 2 + [[0, 0, 1]] * 4).bool()
    own = {0: x[:2], 2: x} if execution != "masked" else {0: x, 2: x}
    torch.testing.assert_close(fusion(x, choice=mask)["more"][1], loss(*own.items()))
    fusion.gate.module.logits.data.copy_(torch.tensor([[3.0, 0, 2]] * N))
    torch.testing.assert_close(fusion(x)["more"][1], loss((0, x), (2, x)))
    assert fusion(x, choice=torch.full((N,), -1))["more"][1] == 0
    everyone = loss(*((b, x) for b in range(BRANCHES)))
    torch.testing.assert_close(fusion(x, choice="uniform")["more"][1], everyone)


def test_auto_is_routed():
    """A loss depends on the rows that its branch is called with, and so on the way."""
    choice = CHOICES["mixed"]
    fusion, x = made(choice), torch.randn(N, FEATURES, dtype=torch.float64)
    fuse = oracle(fusion, choice, whole=False)
    for _ in range(20):
        torch.testing.assert_close(fusion(x)["more"][1], fuse(x)["more"][1])
    assert "auxiliary" in str(fusion.explain(x))
    short = made(choice).eval()
    with torch.no_grad():
        for _ in range(20):
            torch.testing.assert_close(short(x)["more"][1], fuse(x)["more"][1])
        assert "auxiliary" in str(short.explain(x))
        short.calibrate(x)
        torch.testing.assert_close(short(x)["more"][1], fuse(x)["more"][1])


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES, dtype=torch.float64)

    def forward(self, x: Tensor):
        y = self.norm(x) * 2
        return y, y.exp().mean()


def test_a_branch_with_batch_norm_has_the_loss_of_the_whole_batch():
    x = torch.randn(N, FEATURES, dtype=torch.float64)
    results = []
    for execution in ("masked", "routed"):
        branches = [Normed(), Normed()]
        fusion = RoutedFusion(choosing([1, 0, 1, 1, 1, 1], 2), branches, execution=execution)
        results.append(backward(fusion, [fusion], (x,)))
    assert_agree(*results, 1e-12)


def test_the_result_is_nobody_elses_memory():
    table = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    x = torch.randn(N, FEATURES, dtype=torch.float64)
    for split in ([1] * N, [0, 1] * 3):
        fusion = RoutedFusion(choosing(split, 2), [Function(lambda x: (x, table))] * 2)
        _, loss = fusion(x)
        with torch.no_grad():
            loss += 1
            _, loss = fusion.eval()(x)
            loss += 1
        assert table == 3


@pytest.mark.parametrize("execution", ["masked", "routed"])
@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (lambda x: x.sum(), lambda x: x.sum(), r"'0': output 0 must be a tensor of shape"),
        (lambda x: (x.sum(),), lambda x: (x.sum(),), r"'0': output 0 must be a tensor of shape"),
        (lambda x: (x, x.sum().long()), lambda x: (x, x.sum().long()), r"output 1 must be a ten"),
        (lambda x: (x, x.sum()), lambda x: (x, 0.0), r"'1' returns another structure"),
        (lambda x: (x, None), lambda x: (x, x.sum()), r"'1' returns another structure"),
        (lambda x: (x, 1, None), lambda x: (x, 1, x.sum()), r"output 2 .*every branch returns one"),
        (lambda x: (x, x[:, 0]), lambda x: (x, x.sum()), r"output 1 .*every branch returns one"),
    ],
)
def test_what_is_no_loss_is_refused(first, second, said, execution):
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    branches = [Function(first), Function(second)]
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution=execution)
    with pytest.raises(ValueError, match=said):
        fusion(x)
    with pytest.raises(ValueError, match=said), torch.no_grad():
        fusion.eval()(x)


def test_stacks_and_combine_refuse_a_loss():
    stage = Function(lambda x: (x, x.sum()))
    nested = NestedFusion(Function(lambda m, a: m[:, :2]), [stage], [nn.Identity()], [Add()])
    with pytest.raises((TypeError, ValueError)):
        nested(*torch.randn(2, 4, 3))
    plan = route(torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="branch 0: output 1 must be a tensor of shape"):
        combine(plan, [(torch.ones(1, 2), torch.ones(())) for _ in range(2)])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("gate_grad", GATE_GRADS)
def test_compiled(gate_grad):
    class Takes(WithLoss):
        def forward(self, x, steer):
            return super().forward(x)

    fusion = RoutedFusion(
        Steered(), [Takes() for _ in range(BRANCHES)], gate_grad=gate_grad, execution="routed"
    )
    eager = copy.deepcopy(fusion)
    eager.starved = "run"  # copies where a branch has one sample, as in a graph
    compiled = Counted(fusion)
    for steer in splits(6):
        x = torch.randn(len(steer), FEATURES, dtype=torch.float64)
        mine = backward(compiled, [fusion], (x, steer))
        assert_agree(mine, backward(eager, [eager], (x, steer)), 1e-9)
    assert compiled.graphs == 1
