"""What dynamic networks trip over: poison, batch norm, autocast, copies, compilers, processes."""

import copy
import io
import logging
import pickle
import time

import pytest
import torch
import torch.multiprocessing
from models import (
    FEATURES,
    MODES,
    Calls,
    FixedGate,
    Function,
    Planned,
    assert_bitwise,
    assert_close,
    assert_masked,
    assert_same,
    assert_served,
    backward,
    choosing,
    masked_fusion,
    mlp,
    relative_error,
    toy,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dynmm_kernels import Branch, RoutedFusion
from dynmm_kernels.measure.memory import saved_bytes

GATE_GRADS = ["straight_through", "selected", "none"]
MIXED = [0, 2, 1, 0, 2, 2, 1, 0]


def samples(n: int, *shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(n, *(shape or (FEATURES,)), dtype=dtype)


# Poison


class Reciprocal(nn.Module):
    """Finite for its own samples, not for rows that hold a zero."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale / x[:, :1]


@pytest.mark.parametrize("gate_grad", ["selected", "none"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_in_unselected_rows(poison, gate_grad):
    """A missing modality, filled with nan: masked is poisoned, routed is not, gradients too."""
    choice = torch.tensor([0, 1, 0, 1, 1])
    first, second = samples(5), samples(5)
    first[choice == 1] = poison
    second[choice == 0] = poison
    branches = [Branch(mlp(), inputs=[0]), Branch(mlp(), inputs=[1])]
    gate = choosing(choice.tolist(), 2)

    def run(execution):
        fusion = RoutedFusion(gate, branches, execution=execution, gate_grad=gate_grad)
        return backward(fusion, [gate, *branches], (first, second))

    routed = run("routed")
    assert routed.output.isfinite().all()
    learnt = [g for g in routed.all() if g is not None]
    assert all(g.isfinite().all() for g in learnt)
    assert len(learnt) == len(routed.all()) - (gate_grad == "none")  # then the gate gets None
    assert not masked_fusion(gate, branches)(first, second).isfinite().any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_does_not_reach_branches_through_the_exact_gate(poison):
    """Straight-through asks for every output, so the gate's gradient is what masked gives, but
    outputs, branches and inputs stay clean."""
    choice = torch.tensor([0, 1, 0, 1, 1])
    first, second = samples(5), samples(5)
    first[choice == 1] = poison
    branches = [Branch(mlp(), inputs=[0]), Branch(mlp(), inputs=[1])]
    gate = choosing(choice.tolist(), 2)
    fusion = RoutedFusion(gate, branches, execution="routed")
    routed = backward(fusion, branches, (first, second))
    assert routed.output.isfinite().all()
    assert all(g.isfinite().all() for g in routed.all())


def test_poison_of_a_branch_that_was_not_chosen(call):
    gate, (plain, reciprocal) = choosing([0, 1, 0, 1], 2), (mlp(), Reciprocal())
    x = samples(4)
    x[[0, 2], 0] = 0
    routed = call(RoutedFusion(gate, [plain, reciprocal], execution="routed"), x)
    assert_close(routed[[0, 2]], plain(x)[[0, 2]])
    assert_close(routed[[1, 3]], reciprocal(x)[[1, 3]])
    assert not masked_fusion(gate, [plain, reciprocal])(x)[[0, 2]].isfinite().any()


@pytest.mark.parametrize("execution", MODES)
def test_poison_of_a_chosen_branch_is_not_hidden(execution, call):
    gate, branches = choosing([0, 1, 0], 2), toy(2)[1]
    x = samples(3)
    x[1] = float("nan")
    output = call(RoutedFusion(gate, branches, execution=execution), x)
    assert output[1].isnan().all()
    assert_close(output[[0, 2]], branches[0](x)[[0, 2]])


# Batch norm and dropout


def normed(**options) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8, **options), nn.Linear(8, 3)
    ).double()


def batch_norm_problem(**options):
    return choosing(MIXED, 3), [normed(**options), mlp(), normed(**options)], (samples(8),)


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize("execution", ["routed", "auto"])
def test_train_mode_batch_norm_is_exact(execution, options):
    gate, branches, x = batch_norm_problem(**options)
    modules = [gate, *branches]
    copies = copy.deepcopy(modules)
    expected = backward(masked_fusion(copies[0], copies[1:]), copies, x)
    assert_same(backward(RoutedFusion(gate, branches, execution=execution), modules, x), expected)
    for actual, reference in zip(branches, copies[1:], strict=True):
        for a, e in zip(actual.buffers(), reference.buffers(), strict=True):
            assert torch.equal(a, e)
    tracking = options.get("track_running_stats", True)
    assert branches[0][1].track_running_stats is branches[2][1].track_running_stats is tracking


def test_batch_norm_without_running_statistics_couples_samples_in_eval_too():
    gate, branches, x = batch_norm_problem(track_running_stats=False)
    fusion = RoutedFusion(gate, branches, execution="routed")
    assert_served(fusion, masked_fusion(gate, branches), x)


def test_batch_norm_in_eval_is_routed():
    gate, branches, x = batch_norm_problem()
    calls = Calls.of(branches)
    fusion = RoutedFusion(gate, branches, execution="routed").eval()
    with torch.no_grad():
        output = fusion(*x)
        assert calls.rows == [[3], [2], [3]]
        assert_close(output, masked_fusion(gate, branches)(*x))


def test_frozen_batch_norm_in_a_training_module_is_routed():
    """A layer put in eval by hand inside a module in train mode."""
    gate, branches, x = batch_norm_problem()
    for branch in (branches[0], branches[2]):
        branch[1].eval()
    calls = Calls.of(branches)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad="none")
    fusion(*x)
    assert calls.rows == [[3], [2], [3]]


def test_batch_norm_policy_follows_the_mode():
    """Detected for the current mode, not for the one of the first call."""
    gate, branches, x = batch_norm_problem()
    calls = Calls.of(branches)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad="none")
    with torch.no_grad():
        for training, rows in ((True, 8), (False, 3), (True, 8)):
            fusion.train(training)(*x)
            assert calls.rows[0] == [rows]
            calls.clear()
        branches[0].eval()  # behind the back of the fusion
        fusion(*x)
        assert calls.rows[0] == [3]
        calls.clear()
        branches[0].train()
        fusion(*x)
        assert calls.rows[0] == [8]


def test_batch_norm_added_to_a_branch_later():
    """The user goes on building after the fusion was made, or even called."""
    gate, branches = choosing(MIXED, 3), [nn.Sequential(mlp()) for _ in range(3)]
    fusion, x = RoutedFusion(gate, branches, execution="routed"), samples(8)
    fusion(x)
    branches[0].append(nn.BatchNorm1d(3).double())
    assert_close(fusion(x), masked_fusion(gate, branches)(x))


def test_batch_norm_subset():
    """The statistics of the branch's own samples, recorded once."""
    gate, branches, x = batch_norm_problem()
    reference = copy.deepcopy(branches)
    fusion = RoutedFusion(gate, branches, execution="routed", batch_norm="subset")
    output = fusion(*x)
    for b, branch in enumerate(reference):
        rows = [n for n, chosen in enumerate(MIXED) if chosen == b]
        assert relative_error(output[rows], branch(x[0][rows])) <= 1e-12
        for a, e in zip(branches[b].buffers(), branch.buffers(), strict=True):
            assert torch.equal(a, e)


def test_batch_norm_subset_of_one_sample_says_so():
    branches = batch_norm_problem()[1]
    fusion = RoutedFusion(choosing([0, 1, 1], 3), branches, execution="routed", batch_norm="subset")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fusion(samples(3))


def test_batch_norm_of_a_starved_branch_still_runs():
    """Masked updates its statistics with every batch, so routed does."""
    gate, branches = choosing([1, 1, 1], 3), batch_norm_problem()[1]
    calls = Calls.of(branches)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad="none")
    routing = fusion(samples(3), return_routing=True)[1]
    assert calls.rows == [[3], [3], [3]]
    assert routing.rows_run == (3, 3, 3)
    assert branches[0][1].num_batches_tracked == 1


def test_dropout_is_drawn_for_the_rows_that_run():
    """Expectation is kept, selected rows are dropped out, eval has none."""
    gate = choosing([0, 1] * 500, 2)
    branches = [nn.Dropout(0.25), nn.Dropout(0.5)]
    x = torch.ones(1000, 20)
    fusion = RoutedFusion(gate, branches, execution="routed")
    output = fusion(x)
    for b, p in enumerate((0.25, 0.5)):
        own = output[b::2]
        assert set(own.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
        assert abs((own == 0).float().mean().item() - p) < 5 * (p * (1 - p) / own.numel()) ** 0.5
    assert torch.equal(fusion.eval()(x), x)


# Autocast


class EndsInHalf(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(FEATURES, 3)

    def forward(self, x):
        return self.body(x)


class EndsInSingle(EndsInHalf):
    def forward(self, x):
        return self.body(x).float() * 1.5


for_precisions = pytest.mark.parametrize(
    "choice", [[0, 1, 1, 0, 0], [0] * 5, [1] * 5], ids=["both", "0", "1"]
)


@for_precisions
@pytest.mark.parametrize("execution", MODES)
def test_autocast_ends_in_the_widest_dtype_of_what_ran(execution, choice, call):
    gate = choosing(choice, 2, dtype=torch.float32)
    branches = [EndsInHalf(), EndsInSingle()]
    x = samples(5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = call(RoutedFusion(gate, branches, execution=execution, gate_grad="none"), x)
        expected = masked_fusion(gate, branches)(x)
    single = execution == "masked" or 1 in choice
    assert output.dtype is (torch.float32 if single else torch.bfloat16)
    assert torch.equal(output.float(), expected.float())


@pytest.mark.parametrize("gate_grad", GATE_GRADS)
@for_precisions
@pytest.mark.parametrize("execution", MODES)
def test_autocast_with_branches_of_different_precision(execution, choice, gate_grad):
    gate = choosing(choice, 2, dtype=torch.float32)
    branches = [EndsInHalf(), EndsInSingle()]
    x = samples(5, dtype=torch.float32)
    fusion = RoutedFusion(gate, branches, execution=execution, gate_grad=gate_grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fusion(x)
        expected = masked_fusion(gate, branches)(x)
        if len(set(choice)) == 2:
            assert output.dtype is torch.float32
    assert torch.equal(output.float(), expected.float())
    output.float().square().sum().backward()
    actual = [p.grad.clone() for b in branches for p in b.parameters()]
    fusion.zero_grad()
    expected.square().sum().backward()
    reference = [p.grad for b in branches for p in b.parameters()]
    for a, e in zip(actual, reference, strict=True):
        assert a.dtype is torch.float32
        assert (a - e).abs().max() <= 0.02 * max(e.abs().max(), 1e-3)


@pytest.mark.parametrize("cached", [True, False])
def test_autocast_caches_weights_as_before(cached):
    """It caches none while samples follow without a graph."""
    fusion = RoutedFusion(choosing([0, 1, 1], 2), [mlp(dtype=torch.float32) for _ in range(2)])
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
        fusion(samples(3, dtype=torch.float32))
        assert torch.is_autocast_cache_enabled() is cached


@pytest.mark.parametrize("choice", [[0, 1, 1, 0, 0], [1] * 5])
def test_autocast_gate_gradient(choice):
    """A gate in bf16 learns as masked makes it learn."""
    gate = Planned(mlp(2, dtype=torch.float32), torch.tensor(choice), 2)
    branches = [EndsInHalf(), EndsInSingle()]
    x = (samples(5, dtype=torch.float32),)

    def under_autocast(fuse):
        def call(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return fuse(x).float()

        return backward(call, [gate], x)

    expected = under_autocast(masked_fusion(gate, branches))
    actual = under_autocast(RoutedFusion(gate, branches, execution="routed"))
    for a, e in zip(actual.parameters, expected.parameters, strict=True):
        assert relative_error(a, e) <= 0.05


# Copies


def trained_fusion(execution: str = "routed") -> tuple[RoutedFusion, Tensor]:
    """After a step: whatever a forward and a backward leave on the module is there."""
    fusion = RoutedFusion(*toy(), execution=execution, noise="gumbel", temperature=0.5)
    x = samples(6)
    fusion(x, return_routing=True)[0].sum().backward()
    fusion.eval()
    return fusion, x


def saved_and_loaded(fusion: RoutedFusion) -> RoutedFusion:
    buffer = io.BytesIO()
    torch.save(fusion, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda fusion: pickle.loads(pickle.dumps(fusion)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("execution", ["dense", *MODES])
def test_copies(make_copy, execution):
    fusion, x = trained_fusion(execution)
    other = make_copy(fusion)
    assert torch.equal(other(x), fusion(x))
    for name in ("execution", "gate_grad", "temperature", "noise", "batch_norm"):
        assert getattr(other, name) == getattr(fusion, name)
    before = fusion(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(fusion(x), before)
    other(x).sum().backward()


def test_routing_can_be_copied_and_pickled():
    fusion, x = trained_fusion()
    with torch.no_grad():
        routing = fusion(x, return_routing=True)[1]
    for other in (copy.deepcopy(routing), pickle.loads(pickle.dumps(routing))):
        assert other.counts == routing.counts
        assert torch.equal(other.choice, routing.choice)
        assert torch.equal(other.plan.order, routing.plan.order)


def test_state_dict_between_modes():
    fusion, x = trained_fusion("masked")
    other = RoutedFusion(*toy(), execution="routed").eval()
    other.load_state_dict(fusion.state_dict())
    assert_close(other(x), fusion(x))
    assert all(type(value) is Tensor for value in other.state_dict().values())


def test_nothing_of_a_batch_stays_on_the_module():
    fusion, _ = trained_fusion()
    known = {id(p) for p in fusion.parameters()} | {id(b) for b in fusion.buffers()}
    for module in fusion.modules():
        tensors = [v for v in vars(module).values() if isinstance(v, Tensor)]
        assert all(id(tensor) in known for tensor in tensors)


def test_conversion_to_another_dtype(call):
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution="routed")
    x = samples(6)
    expected = masked_fusion(gate, branches)(x)
    assert_close(call(fusion, x), expected)
    output = call(fusion.float(), x.float())
    assert output.dtype is torch.float32
    assert relative_error(output, expected) <= 1e-5


# Checkpointing, compiling, functional transforms


@pytest.mark.parametrize("noise", [None, "gumbel"])
@pytest.mark.parametrize("gate_grad", GATE_GRADS)
def test_checkpointing(gate_grad, noise):
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad, noise=noise)
    x = (samples(20),)

    def plain(x):
        torch.default_generator.manual_seed(7)
        return fusion(x)

    def again(x):
        torch.default_generator.manual_seed(7)
        return checkpoint(fusion, x, use_reentrant=False)

    modules = [gate, *branches]
    assert_bitwise(backward(again, modules, x), backward(plain, modules, x))


def test_checkpointed_branches():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    gate, branches = choosing(MIXED, 3), [Checkpointed() for _ in range(3)]
    x = (samples(8),)
    modules = [gate, *branches]
    expected = backward(masked_fusion(gate, branches), modules, x)
    assert_same(backward(RoutedFusion(gate, branches, execution="routed"), modules, x), expected)


@pytest.fixture
def dynamo():
    """Fresh, strict about its recompile limit (8 per function), and without a log of each step."""
    torch._dynamo.reset()
    logging.disable(logging.DEBUG)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


def random_splits(gate):
    """30 batches of 8 with random decisions, starved branches among them."""
    for step in range(30):
        first, last = (step % 3, step % 3) if step % 5 == 0 else (0, 2)
        gate.decide(torch.randint(first, last + 1, (8,)))
        yield (samples(8),)


@pytest.mark.usefixtures("dynamo")
def test_compile():
    """The fusion as a whole in eval: what masked gives, few recompilations."""
    gate, branches = Planned(mlp(3), torch.zeros(8, dtype=torch.int64), 3), toy()[1]
    fusion = RoutedFusion(gate, branches, execution="routed").eval()
    compiled = torch.compile(fusion, backend="eager")
    for x in random_splits(gate):
        with torch.no_grad():
            assert_close(compiled(*x), masked_fusion(gate, branches)(*x))


@pytest.mark.usefixtures("dynamo")
def test_compile_the_branches_for_training():
    """The documented way in training: each branch compiled by itself, for any number of rows."""
    gate, branches = Planned(mlp(3), torch.zeros(8, dtype=torch.int64), 3), toy()[1]
    compiled = copy.deepcopy(branches)
    for branch in compiled:
        branch.compile(backend="eager", dynamic=True)
    for x in random_splits(gate):
        results = [
            backward(RoutedFusion(gate, own, execution="routed"), [gate, *own], x)
            for own in (branches, compiled)
        ]
        assert_bitwise(*results)


@pytest.mark.parametrize("gate_grad", ["none", "selected"])
def test_double_backward_of_the_branches(gate_grad):
    """A gradient penalty: exact where the gate has no part in it."""
    gate, branches = choosing(MIXED, 3), toy()[1]
    gate.requires_grad_(False)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
    data = samples(8)

    def penalty(fuse):
        x = data.clone().requires_grad_()
        (slope,) = torch.autograd.grad(fuse(x).sin().sum(), x, create_graph=True)
        parameters = [p for branch in branches for p in branch.parameters()]
        loss = slope.square().sum()
        return loss, torch.autograd.grad(loss, [x, *parameters], materialize_grads=True)

    loss, gradients = penalty(fusion)
    expected_loss, expected = penalty(masked_fusion(gate, branches))
    assert relative_error(loss, expected_loss) <= 1e-12
    for a, e in zip(gradients, expected, strict=True):
        assert relative_error(a, e) <= 1e-10 if e.any() else not a.any()


def test_double_backward_with_gate_grad_none():
    """The gate learns nothing, although its logits have a graph."""
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad="none")
    x = samples(8).requires_grad_()
    choice = gate(x).argmax(1)
    (slope,) = torch.autograd.grad(fusion(x).sin().sum(), x, create_graph=True)
    outputs = torch.stack([branches[b](x)[n] for n, b in enumerate(choice)])
    (expected_slope,) = torch.autograd.grad(outputs.sin().sum(), x, create_graph=True)
    assert relative_error(slope, expected_slope) <= 1e-10
    (actual,) = torch.autograd.grad(slope.square().sum(), x)
    (expected,) = torch.autograd.grad(expected_slope.square().sum(), x)
    assert relative_error(actual, expected) <= 1e-10


def test_double_backward_through_straight_through_is_refused():
    """The complement has no graph to differentiate: an error, not a wrong number."""
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution="routed")
    x = samples(8).requires_grad_()
    loss = fusion(x).sin().sum()

    def penalty():
        torch.autograd.grad(loss, x, create_graph=True)[0].square().sum().backward()

    with pytest.raises(RuntimeError, match="a second derivative through the gate's straight"):
        penalty()


def test_retained_graph():
    gate, branches = toy()
    output = RoutedFusion(gate, branches, execution="routed")(samples(8)).sum()
    output.backward(retain_graph=True)
    once = [p.grad.clone() for p in gate.parameters()]
    output.backward()
    for parameter, first in zip(gate.parameters(), once, strict=True):
        assert relative_error(parameter.grad, 2 * first) <= 1e-12


def test_inference_mode_leaves_nothing_behind():
    """What it caches must not be inference tensors when training follows."""
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution="routed")
    x = samples(8)
    with torch.inference_mode():
        inferred = fusion(x)
        fusion(x.clone())
    modules = [gate, *branches]
    expected = backward(masked_fusion(gate, branches), modules, (x,))
    assert_close(inferred.clone(), expected.output)
    assert_same(backward(fusion, modules, (x,)), expected)


# Branches with a will of their own


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, x):
        return x.mul_(2).relu_() * self.scale


@pytest.mark.parametrize("gate_grad", GATE_GRADS)
def test_in_place_branches_do_not_reach_the_callers_input(gate_grad, call):
    gate, branches = choosing(MIXED, 3), [InPlace() for _ in range(3)]
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
    x = samples(8)
    before = x.clone()
    output = call(fusion, x)
    assert torch.equal(x, before)
    assert torch.equal(output, (2 * before).relu() * 3)


def test_branches_that_return_their_input():
    """Views of gathered rows, and of the caller's tensor where all go one way."""
    for choice in (MIXED, [1] * 8):
        gate, branches = (
            choosing(choice, 3),
            [nn.Identity(), Function(lambda x: x.flip(1)), nn.Flatten()],
        )
        fusion = RoutedFusion(gate, branches, execution="routed")
        assert_masked(fusion, masked_fusion(gate, branches), [gate], (samples(8),))


ALIASES = {
    "itself": lambda x: x,
    "a view from its first element": lambda x: x[:, :-1],
    "a view at an offset": lambda x: x[:, 1:],
    "a tuple": lambda x: (x, x[:, 1:]),
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("execution", MODES)
def test_the_output_is_not_the_input(execution, alias, call):
    """Writing into the result must not write into the batch."""
    branches = [Function(alias)] * 2
    fusion = RoutedFusion(choosing([1] * 4, 2), branches, execution=execution, gate_grad="none")
    x = samples(4)
    before = x.clone()
    for leaf in tree_leaves(call(fusion, x)):
        leaf.detach().fill_(7.0)
    assert torch.equal(x, before)


def test_hooks_on_branches():
    gate, branches = choosing(MIXED, 3), toy()[1]
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad="selected")
    log = []
    branches[0].register_forward_pre_hook(lambda m, args: log.append(("pre", len(args[0]))))
    branches[0].register_forward_hook(lambda m, args, out: out * 2)
    branches[0].register_full_backward_hook(lambda m, gin, gout: log.append(("back", len(gout[0]))))
    x = samples(8)
    output = fusion(x)
    output.sum().backward()
    assert log == [("pre", 3), ("back", 3)]
    assert_close(output[[0, 3, 7]].detach(), 2 * branches[0].forward(x)[[0, 3, 7]].detach())


@pytest.mark.parametrize("choice", [MIXED, [1] * 8])
def test_channels_last_is_kept(choice, call):
    formats = []

    class Convolution(nn.Conv2d):
        def forward(self, x):
            formats.append(x.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    branches = [Convolution(4, 5, 3) for _ in range(3)]
    x = samples(8, 4, 6, 7, dtype=torch.float32).to(memory_format=torch.channels_last)
    gate = choosing(choice, 3)
    output = call(RoutedFusion(gate, branches, execution="routed", gate_grad="none"), x)
    assert formats
    assert all(formats)
    assert relative_error(output, masked_fusion(gate, branches)(x)) <= 1e-6
    assert output.is_contiguous(memory_format=torch.channels_last)


UPSTREAMS = {
    "expanded": lambda y: y.sum(),
    "transposed": lambda y: (y.t().contiguous() * torch.arange(8.0)).sum(),
    "strided": lambda y: y[::2, ::2].square().sum(),
    "flipped": lambda y: (y.flip(0) * torch.arange(24.0).view(8, 3)).sum(),
    "stacked": lambda y: (torch.stack([y, 2 * y], -1)[..., 0] * torch.arange(3.0)).sum(),
    "one row": lambda y: y[3].sum(),
}


@pytest.mark.parametrize("loss", UPSTREAMS.values(), ids=UPSTREAMS)
@pytest.mark.parametrize("gate_grad", ["straight_through", "selected"])
def test_gradients_that_are_not_contiguous(gate_grad, loss):
    gate, branches = choosing(MIXED, 3), toy()[1]
    x = (samples(8),)
    modules = [gate, *branches] if gate_grad == "straight_through" else branches
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
    expected = backward(lambda x: loss(masked_fusion(gate, branches)(x)), modules, x)
    assert_same(backward(lambda x: loss(fusion(x)), modules, x), expected)


NOT_LEARNING = {
    "one branch": lambda gate, branches: branches[1].requires_grad_(False),
    "all branches": lambda gate, branches: [b.requires_grad_(False) for b in branches],
    "one bias": lambda gate, branches: branches[2][0].bias.requires_grad_(False),
    "gate": lambda gate, branches: gate.requires_grad_(False),
    "half the gate": lambda gate, branches: gate[0].requires_grad_(False),
    "gate and a branch": lambda gate, branches: (
        gate.requires_grad_(False),
        branches[0].requires_grad_(False),
    ),
}


@pytest.mark.parametrize("freeze", NOT_LEARNING.values(), ids=NOT_LEARNING)
@pytest.mark.parametrize("inputs_learn", [False, True])
def test_frozen_parts(freeze, inputs_learn):
    gate, branches = toy()
    freeze(gate, branches)
    x = samples(12)
    fusion = RoutedFusion(gate, branches, execution="routed")

    def gradients(fuse):
        inputs = x.clone().requires_grad_(inputs_learn)
        fuse(inputs).square().sum().backward()
        found = [p.grad for p in fusion.parameters()] + [inputs.grad]
        fusion.zero_grad()
        return found

    expected = gradients(masked_fusion(gate, branches))
    for a, e in zip(gradients(fusion), expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert relative_error(a, e) <= 1e-10 if e.any() else not a.any()


# The same bits


@pytest.mark.parametrize("gate_grad", GATE_GRADS)
@pytest.mark.parametrize("execution", [mode for mode in MODES if mode != "auto"])
def test_repeats_are_bitwise_equal(execution, gate_grad):
    gate, branches = toy(dtype=torch.float32)
    fusion = RoutedFusion(gate, branches, execution=execution, gate_grad=gate_grad)
    x = (samples(33, dtype=torch.float32),)
    modules = [gate, *branches]
    first = backward(fusion, modules, x)
    for _ in range(20):
        assert_bitwise(backward(fusion, modules, x), first)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("gate_grad", GATE_GRADS)
def test_deterministic_algorithms_change_nothing(gate_grad):
    gate, branches = toy(dtype=torch.float32)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
    x = (samples(33, dtype=torch.float32),)
    modules = [gate, *branches]
    under = backward(fusion, modules, x)
    torch.use_deterministic_algorithms(False)
    assert_bitwise(backward(fusion, modules, x), under)


@pytest.mark.usefixtures("restored_threads")
def test_threads_do_not_change_decisions():
    gate, branches = toy(dtype=torch.float32)
    fusion = RoutedFusion(gate, branches, execution="routed").eval()
    x = samples(5000, dtype=torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad():
            logits = gate(x)
            results.append(RoutedFusion(FixedGate(logits), branches)(x, return_routing=True)[1])
            assert torch.equal(fusion(x, return_routing=True)[1].choice, logits.argmax(1))
    assert torch.equal(results[0].choice, results[1].choice)
    assert torch.equal(results[0].plan.order, results[1].plan.order)


# Memory


class Encoder(nn.Module):
    """Small like one of the MOSEI model: sequence [n, T, features] -> [n, 4]."""

    def __init__(self, features: int, width: int = 20):
        super().__init__()
        self.project = nn.Linear(features, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.encoder(self.project(x))[:, -1])


@pytest.mark.parametrize("count", [0, 5, 21, 32])
@pytest.mark.parametrize("gate_grad", GATE_GRADS)
def test_saved_memory_is_the_active_share(gate_grad, count):
    """Within 10 % of the gate's, plus each branch's in proportion to its rows."""
    n = 32
    choice = (torch.arange(n) < count).long()
    gate = Planned(nn.Sequential(nn.Flatten(), nn.Linear(20 * 8, 2)), choice, 2)
    branches = [Encoder(8), nn.Sequential(Encoder(8), nn.Linear(4, 4))]
    x = samples(n, 20, 8, dtype=torch.float32)
    known = [x, *gate.parameters(), *(p for b in branches for p in b.parameters())]
    share = [1 - count / n, count / n]
    allowed = saved_bytes(lambda: gate(x), known)
    for branch, part in zip(branches, share, strict=True):
        allowed += part * saved_bytes(lambda branch=branch: branch(x), known)
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
    assert saved_bytes(lambda: fusion(x), known) <= 1.1 * allowed


# Processes


def distributed_worker(rank: int, folder: str) -> None:
    """Rank 0 never uses branch 1; rank 1 never uses branch 0 in the second step."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        for gate_grad in GATE_GRADS:
            fusion, steps = distributed_problem(gate_grad)
            parallel = DistributedDataParallel(fusion, broadcast_buffers=False)
            for step in steps:
                x, choice = step[rank]
                fusion.gate.module.decide(choice)
                parallel(x).square().mean().backward()
            gradients = [p.grad for p in fusion.parameters()]
            torch.save(gradients, f"{folder}/{gate_grad}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def distributed_problem(gate_grad: str):
    """The fusion, and for each of two steps each rank's samples and decisions."""
    torch.manual_seed(11)
    gate, branches = toy(2)
    gate = Planned(gate, torch.zeros(4, dtype=torch.int64), 2)
    gate.requires_grad_(gate_grad != "none")
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
    choices = [([0, 0, 0, 0], [0, 1, 1, 0]), ([0, 0, 0, 0], [1, 1, 1, 1])]
    return fusion, [[(samples(4), torch.tensor(choice)) for choice in step] for step in choices]


def test_distributed_with_starved_ranks(tmp_path):
    """No rank waits for gradients that never come; they are those of one process."""
    context = torch.multiprocessing.spawn(
        distributed_worker, args=(str(tmp_path),), nprocs=2, join=False
    )
    deadline = time.monotonic() + 120
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the two processes hang")
    for gate_grad in GATE_GRADS:
        fusion, steps = distributed_problem(gate_grad)
        for step in steps:
            for x, choice in step:
                fusion.gate.module.decide(choice)
                (fusion(x).square().mean() / 2).backward()
        expected = [p.grad for p in fusion.parameters()]
        for rank in range(2):
            actual = torch.load(tmp_path / f"{gate_grad}-{rank}.pt")
            for a, e in zip(actual, expected, strict=True):
                assert (a is None) == (e is None)
                assert a is None or relative_error(a, e) <= 1e-10
