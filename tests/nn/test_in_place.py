"""Layers that work in place: behind a fusion, and first in a part whose inputs others read."""

import pytest
import torch
from models import FEATURES, Function, assert_close, assert_same, backward, choosing, mlp, toy
from stacks import CHANNELS, batch
from torch import Tensor, nn

from dynmm_kernels import Branch, ChainedFusion, Lazy, NestedFusion, RoutedFusion
from dynmm_kernels.nn import Add, SEAdd, WeightedSum

SPLITS = [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
DEPTHS = [[0, 2, 1, 0], [2, 2, 2, 2], [0, 0, 0, 0], [1, 1, 1, 1]]
EXECUTIONS = ["routed", "masked"]
RULES = ["fuse", "skip", "fuse"]

for_executions = pytest.mark.parametrize("execution", EXECUTIONS)
for_depths = pytest.mark.parametrize("depths", DEPTHS)


def relu_first(features: int = CHANNELS, inplace: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(inplace=inplace), mlp(features, features))


def out_of_place(module: nn.Module) -> nn.Module:
    """The same parameters behind a ReLU that leaves its input alone."""
    if isinstance(module, nn.Sequential) and isinstance(module[0], nn.ReLU):
        return nn.Sequential(nn.ReLU(), *module[1:])
    return module


@for_executions
@pytest.mark.parametrize("gate_grad", ["straight_through", "selected", "none"])
@pytest.mark.parametrize("last", [nn.Identity, nn.Sigmoid, nn.ReLU])
@pytest.mark.parametrize("split", SPLITS)
def test_behind_a_fusion_whatever_was_chosen(split, last, gate_grad, execution):
    """Also where a branch keeps what it returned for its backward pass, or nobody chose one."""
    branches = [nn.Sequential(mlp(3), last()) for _ in range(2)]
    gate = choosing(split, 2)
    fusion = RoutedFusion(gate, branches, execution=execution, gate_grad=gate_grad)
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    in_place = nn.Sequential(fusion, nn.ReLU(inplace=True))
    plain = nn.Sequential(fusion, nn.ReLU())
    modules = [gate, *branches]
    assert_same(backward(in_place, modules, [x]), backward(plain, modules, [x]))
    assert_close(in_place(x), plain(x))


@for_executions
@for_depths
@pytest.mark.parametrize("last", [nn.Identity, nn.Sigmoid])
def test_behind_a_stack_whatever_was_chosen(depths, last, execution):
    main, aux = ([nn.Sequential(mlp(CHANNELS, CHANNELS), last()) for _ in range(2)] for _ in "ab")
    gate = choosing(depths, 3)
    nested = NestedFusion(gate, main, aux, [Add(), Add()], execution=execution)
    modules = [gate, *main, *aux]

    def behind(relu, depth):
        def call(m, a):
            out, (first,) = nested(m, a, stages=[1], depth=depth)
            return relu(out) + relu(first)

        return backward(call, modules, inputs)

    inputs = batch("mlp", 4)
    for depth in (None, torch.tensor(depths)):
        assert_same(behind(torch.relu_, depth), behind(torch.relu, depth))


CONTEXTS = [torch.no_grad, torch.inference_mode, torch.enable_grad]


@for_executions
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    "between", [nn.Identity(), nn.Dropout(0.5), Function(lambda x: x.view(len(x), -1)), None]
)
def test_outputs_of_stages_stay_what_they_were(between, context, execution):
    """Also where the next main stage returns what it was given, and where a cell fuses nothing."""
    main = [mlp(CHANNELS, CHANNELS), between or relu_first(), relu_first()]
    aux = [mlp(CHANNELS, CHANNELS) for _ in range(3)]
    for depth in (3, 1, 0, torch.tensor([3, 1, 0])):
        chain = ChainedFusion(
            [None] * 3, main, aux, [Add()] * 3, rules=RULES, execution=execution
        ).eval()
        m, a = batch("mlp", 3)
        with context():
            last, got = chain(m, a, depth=depth, stages=[1, 2])
            deep = torch.as_tensor(depth).expand(3).unsqueeze(1)
            first = main[0](m) + torch.where(deep >= 1, aux[0](a), 0)
            second = out_of_place(main[1])(first)
            third = aux[2](aux[1](aux[0](a)))
            expected = out_of_place(main[2])(second) + torch.where(deep >= 3, third, 0)
        assert_close(got, [first, second])
        assert_close(last, expected)


@for_executions
@for_depths
@pytest.mark.parametrize("fusion", [Add, WeightedSum, lambda: SEAdd(CHANNELS)])
def test_stages_behind_a_fusion_that_keeps_what_it_read(fusion, depths, execution):
    """Each stage begins in place; a fusion may need what it read for its backward pass."""
    main, aux = ([relu_first() for _ in range(2)] for _ in "ab")
    fusions = [fusion().double() for _ in range(2)]
    gate = choosing(depths, 3)

    def loss(stages_of):
        nested = NestedFusion(
            gate,
            [stages_of(module) for module in main],
            [stages_of(module) for module in aux],
            fusions,
            execution=execution,
        )
        return backward(nested, [gate, *main, *aux, *fusions], batch("mlp", 4))

    torch.manual_seed(1)
    ours = loss(lambda module: module)
    torch.manual_seed(1)
    assert_same(ours, loss(out_of_place))


@for_executions
def test_a_stage_in_place_some_cells_behind_a_fusion_that_keeps_what_it_read(execution):
    """What it read goes through a stage that returns its input, and a cell that fuses nothing."""
    main = [mlp(CHANNELS, CHANNELS) for _ in range(3)]
    fusion, last = WeightedSum().double(), relu_first()

    def loss(stage):
        aux = [mlp_first, nn.Identity(), stage]
        chain = ChainedFusion(
            [None] * 3, main, aux, [fusion, Add(), Add()], rules=RULES, execution=execution
        )
        return backward(chain, [*main, *aux, fusion], inputs)

    mlp_first, inputs = mlp(CHANNELS, CHANNELS), batch("mlp", 3)
    assert_same(loss(last), loss(out_of_place(last)))


class Replace(nn.Module):
    """A fusion that takes the auxiliary stream: main and aux are then one tensor."""

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return aux


@pytest.mark.parametrize("depths", DEPTHS)
def test_followers_in_place_behind_a_fusion_that_returns_what_it_read(depths):
    """Without a graph of their own, they are kept for the gradient of the gate."""
    gate, main = choosing(depths, 3), [mlp(CHANNELS, CHANNELS) for _ in range(2)]
    aux, inputs = [mlp(CHANNELS, CHANNELS), relu_first()], batch("mlp", 4)

    def loss(last):
        nested = NestedFusion(gate, main, [aux[0], last], [Replace(), Add()], execution="routed")
        return backward(nested, [gate, *main, *aux], inputs)

    assert_same(loss(aux[1]), loss(out_of_place(aux[1])))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("depths", [[4] * 3, [4, 2, 3]])
def test_a_lent_output_that_lives_on_in_the_auxiliary_stream(depths, context):
    """The output of stage 2 is the auxiliary stream, which a stage then writes into."""
    gate, main = choosing(depths, 5), [mlp(CHANNELS, CHANNELS) for _ in range(4)]
    aux = [mlp(CHANNELS, CHANNELS), mlp(CHANNELS, CHANNELS), nn.Identity(), relu_first()]
    fusions, inputs = [Add(), Replace(), Add(), Add()], batch("mlp", 3)

    def outputs(last):
        nested = NestedFusion(gate, main, [*aux[:3], last], fusions, gate_grad="none")
        with context():
            out, (second,) = nested(*inputs, stages=[2])
        return out, second

    for got, wanted in zip(outputs(aux[3]), outputs(out_of_place(aux[3])), strict=True):
        assert_close(got, wanted)


def test_an_output_that_a_fusion_keeps_for_its_backward_pass():
    """The result is the auxiliary stream, needs no gradient, and SEAdd has saved it."""
    gate, main = choosing([2, 2, 2], 3), [mlp(CHANNELS, CHANNELS) for _ in range(2)]
    fusions, inputs = [SEAdd(CHANNELS).double(), Replace()], batch("mlp", 3)

    def loss(behind):
        nested = NestedFusion(gate, main, [nn.ReLU(), nn.Identity()], fusions, gate_grad="none")
        out, (first,) = nested(*inputs, stages=[1])
        return torch.autograd.grad(first.sum() + behind(out).sum(), [*fusions[0].parameters()])

    for got, wanted in zip(loss(nn.ReLU(inplace=True)), loss(nn.ReLU()), strict=True):
        assert_close(got, wanted)


def test_followers_in_place_once_everybody_was_dropped():
    gate, main = choosing([0, 0, 0], 2), [mlp(CHANNELS, CHANNELS) for _ in range(3)]
    first, fusion, last = mlp(CHANNELS, CHANNELS), WeightedSum().double(), relu_first()
    inputs = batch("mlp", 3)

    def loss(stage):
        aux, fusions = [first, nn.Dropout(0.0), stage], [fusion, Add(), Add()]
        chain = ChainedFusion([None, gate, None], main, aux, fusions, execution="routed")
        return backward(chain, [gate, *main, first, fusion, last], inputs)

    assert_same(loss(last), loss(out_of_place(last)))


class Keeping(nn.Module):
    """A gate whose backward pass needs both streams as it read them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, CHANNELS, dtype=torch.float64))

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return torch.stack([(main * aux * w).sum(1) for w in self.weight], 1)


@for_executions
@pytest.mark.parametrize("seed", range(3))
def test_stages_behind_a_gate_that_keeps_what_it_read(seed, execution):
    torch.manual_seed(seed)
    main, aux = ([relu_first() for _ in range(3)] for _ in "ab")
    gates, inputs = [Keeping() for _ in range(3)], batch("mlp", 5)

    def loss(stages_of):
        chain = ChainedFusion(
            gates,
            [stages_of(module) for module in main],
            [stages_of(module) for module in aux],
            [Add() for _ in range(3)],
            execution=execution,
        )
        return backward(chain, [*gates, *main, *aux], inputs)

    assert_same(loss(lambda module: module), loss(out_of_place))


@for_executions
@for_depths
@pytest.mark.parametrize("context", CONTEXTS)
def test_stages_in_place_behind_a_fusion_that_returns_what_it_read(context, depths, execution):
    main, aux = ([relu_first(), relu_first()] for _ in "ab")
    nested = NestedFusion(
        choosing(depths, 3), main, aux, [Replace(), Replace()], execution=execution
    )
    m, a = batch("mlp", 4)
    with context():
        got = nested(m, a)
        deep = [torch.tensor(depths).ge(k).unsqueeze(1) for k in (1, 2)]
        (m0, m1), (a0, a1) = ([out_of_place(s) for s in stages] for stages in (main, aux))
        first = torch.where(deep[0], a0(a), m0(m))
        assert_close(got, torch.where(deep[1], a1(a0(a)), m1(first)))


@for_executions
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_store_of_a_lazy_modality_is_not_written(split, context, execution):
    store = torch.randn(4, FEATURES, dtype=torch.float64)
    before = store.clone()
    branches = [relu_first(FEATURES) for _ in range(2)]
    fusion = RoutedFusion(Branch(choosing(split, 2), inputs=[0]), branches, execution=execution)
    for branch in fusion.branches:
        branch.inputs = [1]

    def fetch(indices: Tensor) -> Tensor:
        return store if len(indices) == 4 else store[: len(indices)]

    with context():
        fusion(torch.zeros(4, 1), Lazy(fetch))
    assert torch.equal(store, before)


@for_executions
@pytest.mark.parametrize("split", SPLITS)
def test_a_tensor_read_twice_by_a_branch_that_begins_in_place(split, execution):
    """One tensor stays one, so what is written through one name is read through the other."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x, same):
            return self.relu(x) + same

    fusion = RoutedFusion(
        Branch(choosing(split, 2), inputs=[0]), [Twice(), Twice()], execution=execution
    )
    for branch in fusion.branches:
        branch.inputs = [0, 0]
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    before = x.clone()
    assert_close(fusion(x), 2 * before.relu())
    assert torch.equal(x, before)


def test_writes_are_not_seen_in_tensors_of_inference_mode():
    """Documented: they carry no version, so only layers known to work in place are kept apart."""
    gate, branches = toy(2)
    fusion = RoutedFusion(gate, [branches[0], Function(lambda x: x.mul_(2)[:, :3])]).eval()
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    with torch.inference_mode():
        fusion(x.clone(), choice=1)
        with pytest.raises(ValueError, match="must not write into its inputs"):
            fusion(x, choice=1)


def test_a_layer_in_place_added_to_a_branch_later():
    """The user goes on building after the fusion was made."""
    branches = [nn.Sequential(mlp(3)) for _ in range(2)]
    fusion = RoutedFusion(choosing([1, 1, 1], 2), branches)
    branches[1].insert(0, nn.ReLU(inplace=True))
    x = torch.randn(3, FEATURES, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        out = fusion.eval()(x)
        assert torch.equal(x, before)
        assert torch.equal(out, branches[1](x))
