"""RoutedFusion and the functional floor compiled as a whole: one graph for every split."""

import copy

import pytest
import torch
from compiling import (
    ATTENTION,
    BRANCHES,
    GATE_GRADS,
    Counted,
    N,
    assert_agree,
    batches,
    check,
    modalities,
    simple,
    splits,
    unlike,
)
from models import FEATURES, backward, mlp
from torch import nn
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dynmm_kernels import (
    Branch,
    RoutedFusion,
    combine,
    gather,
    resource_loss,
    route,
)

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
]


@pytest.mark.parametrize(
    "settings",
    [{"gate_grad": gate_grad} for gate_grad in GATE_GRADS]
    + [{"select": 2}, {"select": "multi_hot"}],
    ids=str,
)
def test_routed_training(settings):
    check(unlike(**settings), map(modalities, splits(8)))


def test_routed_eval():
    check(unlike().eval(), map(modalities, splits(40)))


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.parametrize("training", [False, True])
def test_inductor(training):
    """Its default layout of convolutions is wrong for a number of rows it is not told."""
    with torch._inductor.config.patch(layout_optimization=False), sdpa_kernel(ATTENTION):
        fusion = unlike().train(training)
        check(fusion, map(modalities, splits(12)), 1e-7, backend="inductor")


@pytest.mark.usefixtures("cpp_compiler")
def test_convolutions_with_unknown_rows_still_need_the_switch():
    """A bug of torch: once this fails, the switch and its page can go."""
    torch.manual_seed(3)
    fusion = unlike().eval()
    compiled = torch.compile(fusion, fullgraph=True)
    with pytest.raises(AssertionError, match="expected size"), torch.no_grad():
        compiled(modalities(next(splits(1))))


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.LSTM(4, 3, batch_first=True)

    def forward(self, sequence):
        return self.own(sequence)[0][:, -1]


def test_recurrent_branches_are_not_traced():
    """A limit of torch: once this fails, its page can go. The other parts compile."""
    fusion = unlike(execution="routed").eval()
    fusion.branches[1] = Reading().double()
    x = modalities(next(splits(1)))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"RNN|LSTM"):
        torch.compile(fusion, backend="eager", fullgraph=True)(x)
    expected = fusion(x)
    for part in (fusion.gate, fusion.branches[0], fusion.branches[2]):
        part.compile(backend="eager", dynamic=True)
    torch.testing.assert_close(fusion(x), expected)


CHOICES = {
    "one for all": 1,
    "one each": torch.tensor([0, 1, 1, -1, 0, 1, 1, 1, 0]),
    "several": torch.tensor([[True, False, True], [False, False, False], [True] * 3] * 3),
    "uniform": "uniform",
}


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("choice", CHOICES)
def test_forced_choices(choice, execution):
    fusion = simple(execution=execution)
    check(fusion, batches(3), call=lambda fuse, x: fuse(x, choice=CHOICES[choice]), backend="eager")


def test_choices_that_vary():
    fusion = simple()
    compiled = Counted(fusion, "eager")
    for x in batches(8):
        choice = torch.randint(-1, BRANCHES, (N,))
        torch.testing.assert_close(compiled(x, choice=choice), fusion(x, choice=choice))
    assert compiled.graphs == 1


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = mlp()

    def forward(self, x):
        y = self.own(x)
        return {"scores": y, "more": [y.sum(1), y > 0]}


class Checkpointed(Structured):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Sequential(mlp(), nn.BatchNorm1d(3).double())

    def forward(self, x):
        return self.own(x)


@pytest.mark.parametrize(
    ("made", "settings"),
    [
        ([Structured, Structured, Structured], {}),
        ([Checkpointed, Checkpointed, Structured], {}),
        ([Normed, mlp, mlp], {}),
        ([mlp, mlp, mlp], {"execution": "auto"}),
        ([mlp, mlp, mlp], {"execution": "masked"}),
        ([mlp, mlp, mlp], {"execution": "dense"}),
    ],
)
def test_more_branches_and_settings(made, settings):
    fusion = RoutedFusion(mlp(BRANCHES), [make() for make in made], **settings)
    if settings.get("execution") != "dense":
        check(fusion, batches())
    else:
        compiled = Counted(fusion)
        for x in batches():
            torch.testing.assert_close(compiled(x), fusion(x))
        assert compiled.graphs == 1


def test_autocast():
    fusion = simple().float()
    masked = copy.deepcopy(fusion)
    masked.execution = "masked"

    def under_autocast(fuse, x):
        with torch.autocast("cpu", torch.bfloat16):
            return fuse(x)

    compiled = Counted(lambda x: under_autocast(fusion, x))
    for x in batches():
        expected = under_autocast(masked, x.float())
        torch.testing.assert_close(compiled(x.float()), expected, rtol=2e-2, atol=2e-2)
    assert compiled.graphs == 1


def test_a_loss_of_what_was_decided():
    costly = [Branch(mlp(), cost=float(b)) for b in range(BRANCHES)]
    fusion = RoutedFusion(mlp(BRANCHES), costly)

    def loss(x):
        output, routing = fusion(x, return_routing=True)
        return output.sum() + resource_loss(routing) + routing.expected_cost

    compiled = Counted(loss, "eager")
    for x in batches():
        torch.testing.assert_close(compiled(x), loss(x))
    assert compiled.graphs == 1


def test_sizes_of_batches():
    fusion = simple()
    compiled = Counted(fusion)
    for size in (9, 5, 7, 30, 2, 3):
        x = torch.randn(size, FEATURES, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), fusion(x))
    assert compiled.graphs <= 2


def test_undefined_logits_stop_the_graph():
    compiled = Counted(simple(execution="routed"), "eager")
    x = next(batches(1))
    compiled(x)
    x[3] = float("nan")
    with pytest.raises(RuntimeError, match="assertion"):
        compiled(x)


def test_undefined_logits_are_not_seen_when_masked():
    """Zero in eval, nan in training; the other rows are as they would be."""
    fusion = unlike(execution="masked")
    steer = next(splits(1))
    defined = modalities(steer)
    x = {**defined, "steer": steer.index_fill(0, torch.tensor([3]), float("nan"))}
    others = torch.arange(N) != 3
    for training in (False, True):
        fusion.train(training)
        compiled = Counted(fusion, "eager")
        with torch.set_grad_enabled(training):
            output = compiled(x)
            torch.testing.assert_close(output[others], fusion(defined)[others])
        assert output[3].isnan().all() if training else not output[3].any()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_functional_floor(weighted):
    modules = nn.ModuleList([mlp() for _ in range(BRANCHES)])

    def fuse(x, steer):
        plan = route(steer.argmax(1), BRANCHES)
        outputs = [own(rows) for own, rows in zip(modules, gather(plan, 2 * x), strict=True)]
        return combine(plan, outputs, x[:, 0] if weighted else None)

    compiled = Counted(fuse)
    for steer in splits(12):
        x = (next(batches(1)), steer)
        assert_agree(backward(compiled, [modules], x), backward(fuse, [modules], x))
    assert compiled.graphs == 1


def test_selections_flat_masks_and_batches_nobody_answers():
    def floor(x, y, mask):
        plan = route(mask, 1)
        ((part,),) = gather(plan, [x, y], select=[[1]])
        return combine(plan, [part.sin()], like=y)

    compiled = Counted(floor)
    for share in (0.5, 0.0, 1.0):
        x, y = torch.randn(2, N, 4, dtype=torch.float64)
        mask = torch.rand(N) < share
        out = compiled(x, y, mask)
        torch.testing.assert_close(out, torch.where(mask[:, None], y.sin(), 0))
    assert compiled.graphs == 1
