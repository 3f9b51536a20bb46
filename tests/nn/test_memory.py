"""Modules that work in place, and what others read of the memory they could write to."""

import weakref

import pytest
import torch
from models import FEATURES, Function, assert_close, choosing, mlp
from stacks import CHANNELS, batch
from torch import Tensor, nn

from dynmm_kernels import Branch, ChainedFusion, NestedFusion, RoutedFusion

EXECUTIONS = ["routed", "masked"]
CHOICES = [[0, 1, 1, 0], [1, 1, 1, 1]]
DEPTHS = [[0, 2, 1, 0], [2, 2, 2, 2], [0, 0, 0, 0], [1, 1, 1, 1]]

for_executions = pytest.mark.parametrize("execution", EXECUTIONS)
for_depths = pytest.mark.parametrize("depths", DEPTHS)
for_graphs = pytest.mark.parametrize("grad", [False, True])


def relu_first(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(inplace=True), module)


def as_if_out_of_place(module: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), *module[1:])


@for_executions
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("writes", [[0, 1, 2], [0], [1], [2]], ids=["all", "gate", "0", "1"])
def test_layers_in_place_reach_nobody_else(writes, choice, execution, call):
    """Neither the caller nor other branches."""
    plain = [choosing(choice, 2), mlp(3), mlp(3)]
    gate, *branches = (relu_first(m) if i in writes else m for i, m in enumerate(plain))
    fusion = RoutedFusion(gate, branches, execution=execution)
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    before = x.clone()
    output = call(fusion, x)
    seen = [before.relu() if i in writes else before for i in (1, 2)]
    expected = [branch(own) for branch, own in zip(plain[1:], seen, strict=True)]
    assert torch.equal(x, before)
    assert_close(output, torch.stack([expected[b][n] for n, b in enumerate(choice)]))


@pytest.mark.parametrize(
    ("choice", "execution"), [([1, 1, 1], "routed"), ([0, 1, 1], "masked"), ([0, 1, 1], "dense")]
)
def test_a_branch_that_writes_into_what_others_read_is_named(choice, execution, call):
    twice = Function(lambda x: x.mul_(2))
    fusion = RoutedFusion(choosing(choice, 2), {"a": mlp(3), "b": twice}, execution=execution)
    with pytest.raises(ValueError, match="branch 'b' must not write into its inputs"):
        call(fusion, torch.randn(3, FEATURES, dtype=torch.float64))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_gate_that_writes_is_named(choice, call):
    gate = choosing(choice, 2)
    fusion = RoutedFusion(Function(lambda x: gate(x.mul_(2))), [mlp(3), mlp(3)])
    with pytest.raises(ValueError, match="the gate must not write into its inputs"):
        call(fusion, torch.randn(4, FEATURES, dtype=torch.float64))


@for_executions
@for_graphs
@for_depths
def test_stages_in_place_do_not_reach_the_caller(depths, grad, execution):
    main, aux = ([relu_first(mlp(CHANNELS, CHANNELS)), mlp(CHANNELS, CHANNELS)] for _ in range(2))
    add = Function(lambda r, a: r + a)
    nested = NestedFusion(choosing(depths, 3), main, aux, [add, add], execution=execution)
    inputs = batch("mlp", 4)
    before = [x.clone() for x in inputs]
    with torch.set_grad_enabled(grad):
        output, (first,) = nested(*inputs, stages=[1])
        plain = [as_if_out_of_place(stages[0]) for stages in (main, aux)]
        r, a = (stage(x) for stage, x in zip(plain, before, strict=True))
        deep = [torch.tensor(depths).ge(k).unsqueeze(1) for k in (1, 2)]
        r = torch.where(deep[0], r + a, r)
        expected = main[1](r)
        expected = torch.where(deep[1], expected + aux[1](a), expected)
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))
    assert_close(first, r)
    assert_close(output, expected)


@for_executions
@for_graphs
@for_depths
def test_a_stage_must_not_write_into_an_output_that_was_asked_for(depths, grad, execution):
    main = [mlp(CHANNELS, CHANNELS), Function(lambda x: x.mul_(2))]
    aux, add = [mlp(CHANNELS, CHANNELS) for _ in range(2)], Function(lambda r, a: r + a)
    nested = NestedFusion(choosing(depths, 3), main, aux, [add, add], execution=execution)
    with torch.set_grad_enabled(grad):
        nested(*batch("mlp", 4))  # nobody reads the output of stage 1
        with pytest.raises(ValueError, match="main stage 2 must not write into its inputs"):
            nested(*batch("mlp", 4), stages=[1])


@for_executions
@pytest.mark.parametrize("depths", [[0, 2, 1, 0], [2, 2, 2, 2], [1, 1, 1, 1]])
@pytest.mark.parametrize("write", [lambda r, a: r.add_(a), lambda r, a: a.add_(r)])
def test_a_fusion_must_not_write_into_its_arguments(write, depths, execution):
    stages = [mlp(CHANNELS, CHANNELS) for _ in range(4)]
    fusions = [Function(write), Function(write)]
    nested = NestedFusion(choosing(depths, 3), stages[:2], stages[2:], fusions, execution=execution)
    with torch.no_grad(), pytest.raises(ValueError, match="fusion 1 must not write into its"):
        nested(*batch("mlp", 4))


class Remembering(nn.Module):
    """Keeps what it returned last, as feature extractors do."""

    def __init__(self):
        super().__init__()
        self.stage = mlp(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.stage(x)
        return self.last


@for_graphs
@for_depths
def test_what_a_stage_remembers_stays(depths, grad):
    main, aux = [Remembering(), Remembering()], [mlp(CHANNELS, CHANNELS) for _ in range(2)]
    add = Function(lambda r, a: r + a)
    nested = NestedFusion(choosing(depths, 3), main, aux, [add, add], execution="routed")
    copies = []
    for stage in main:
        stage.register_forward_hook(lambda _, args, output: copies.append(output.clone()))
    with torch.set_grad_enabled(grad):
        nested(*batch("mlp", 4))
    assert all(torch.equal(stage.last, copy) for stage, copy in zip(main, copies, strict=True))


def test_the_auxiliary_stream_is_freed_once_nobody_needs_it():
    alive: list[weakref.ref] = []
    seen = []

    def aux(x):
        output = x + 1
        alive.append(weakref.ref(output))
        return output

    def main(x):
        seen.append([ref() is not None for ref in alive])
        return x + 1

    add = Function(lambda r, a: r + a)
    nested = NestedFusion(
        choosing([1, 1, 1], 4), *([Function(f)] * 3 for f in (main, aux)), [add] * 3
    )
    with torch.no_grad():
        nested(*batch("mlp", 3))
    assert seen == [[], [False], [False]]


@pytest.mark.parametrize("execution", [*EXECUTIONS, "dense"])
def test_an_auxiliary_stream_that_no_cell_reads_gets_no_gradient(execution):
    stages = [mlp(CHANNELS, CHANNELS) for _ in range(4)]
    add = Function(lambda r, a: r + a)
    chain = ChainedFusion(
        [None] * 2, stages[:2], stages[2:], [add] * 2, rules=["skip"] * 2, execution=execution
    )
    for depth in (None, 0, 2):
        main, aux = (x.requires_grad_() for x in batch("mlp", 3))
        chain(main, aux, depth=depth).sum().backward()
        assert main.grad is not None
        assert aux.grad is None


def test_parts_may_be_replaced():
    fusion = RoutedFusion(Branch(mlp(2), inputs=[0]), nn.ModuleDict({"a": mlp(3), "b": mlp(3)}))
    fusion.branches[1], fusion.gate = mlp(3), mlp(2)
    assert [branch.name for branch in fusion.branches] == ["a", "b"]
    assert (fusion.gate.inputs, fusion.gate.name) == ([0], "gate")
    stages = [mlp(CHANNELS, CHANNELS) for _ in range(2)]
    nested = NestedFusion(choosing([0, 1], 2), [stages[0]], [stages[1]], [nn.Bilinear(4, 4, 4)])
    nested.gate, nested.main_stages[0] = choosing([1, 1], 2), nn.Identity()
    nested.aux_stages[-1], nested.fusions[0] = nn.Identity(), Function(lambda r, a: r + a)
    main, aux = batch("mlp", 2)
    assert torch.equal(nested(main, aux), main + aux)
    nested.main_stages[0] = Branch(nn.Identity(), name="stem", cost=3.0)
    assert torch.equal(nested(main, aux), main + aux)
    assert [(stage.label, stage.cost) for stage in nested.main_stages] == [("stem", 3.0)]
