"""What stands around the modules of a fusion: hooks, compiled calls, subclasses, exceptions."""

import gc

import pytest
import torch
from models import FEATURES, Function, choosing, mlp, toy
from stacks import CHANNELS, batch
from torch import nn

from dynmm_kernels import Branch, Lazy, NestedFusion, RoutedFusion
from dynmm_kernels.nn import Add

SPLITS = [[0, 1, 1, 0], [1, 1, 1, 1]]
for_splits = pytest.mark.parametrize("split", SPLITS)
for_grads = pytest.mark.parametrize("grad", [False, True])


@for_splits
@for_grads
@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_hooks_of_branches_and_of_the_gate_run(split, grad, execution):
    fusion = RoutedFusion(
        choosing(split, 2),
        {"a": Branch(mlp(3), inputs=[1]), "b": Branch(mlp(3, 2), inputs=lambda x, y: x)},
        execution=execution,
        gate_grad="none",
    ).train(grad)
    seen: list = []
    for part in (fusion.gate, *fusion.branches):
        part.register_forward_pre_hook(lambda m, args: seen.append((m.name, [*args[-1].shape])))
        part.register_forward_hook(lambda m, args, out: seen.append((m.name, len(out))))
        part.register_full_backward_hook(lambda m, *_: seen.append(m.name))
    x, y = (torch.randn(4, n, dtype=torch.float64, requires_grad=grad) for n in (2, FEATURES))
    with torch.set_grad_enabled(grad):
        out = fusion(x, y)
    rows = [split.count(b) if execution == "routed" else 4 for b in (0, 1)]
    expected: list = [("gate", [4, FEATURES]), ("gate", 4)]
    for name, width, count in (("a", FEATURES, rows[0]), ("b", 2, rows[1])):
        expected += [(name, [count, width]), (name, count)] if count else []
    assert seen == expected
    if grad:
        seen.clear()
        out.sum().backward()
        assert sorted(seen) == sorted(name for name, count in zip("ab", rows, strict=True) if count)


def test_a_hook_may_change_what_goes_in_and_comes_out():
    fusion = RoutedFusion(choosing([0, 1], 2), [nn.Identity(), nn.Identity()]).eval()
    fusion.branches[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    fusion.branches[1].register_forward_hook(lambda m, args, out: out * 10)
    with torch.no_grad():
        assert fusion(torch.tensor([[1.0], [2.0]])).flatten().tolist() == [1, 30]


def test_hooks_of_stages_run():
    stages = [mlp(CHANNELS, CHANNELS) for _ in range(2)]
    nested = NestedFusion(choosing([0, 1, 1], 2), [stages[0]], [stages[1]], [Add()])
    seen = []
    for part in (nested.gate, nested.main_stages[0], nested.aux_stages[0], nested.fusions[0]):
        part.register_forward_hook(lambda m, args, out: seen.append((m.name, len(args[-1]))))
    with torch.no_grad():
        nested(*batch("mlp", 3))
    assert seen == [("the gate", 3), ("main stage 1", 3), ("aux stage 1", 2), ("fusion 1", 2)]


def test_a_branch_without_a_name_shares_its_hooks_with_the_fusion():
    branch, seen = Branch(nn.Identity()), []
    branch.register_forward_hook(lambda *_: seen.append(1))
    fusion = RoutedFusion(choosing([0, 1], 2), [branch, branch]).eval()
    branch.register_forward_hook(lambda *_: seen.append(2))
    with torch.no_grad():
        fusion(torch.ones(2, 1))
    assert seen == [1, 2, 1, 2]
    assert branch.name is None


@for_splits
def test_a_subclass_of_branch_with_a_forward_of_its_own(split):
    class Doubled(Branch):
        def forward(self, *inputs, **options):
            return 2 * super().forward(*inputs, **options)

    branches = [Doubled(nn.Identity(), inputs=[0]), Doubled(nn.Identity())]
    fusion = RoutedFusion(Branch(choosing(split, 2)), branches).eval()
    x = torch.randn(4, 3)
    with torch.no_grad():
        assert torch.equal(fusion(x), 2 * x)
        assert all(isinstance(branch, Doubled) for branch in fusion.branches)


def test_a_compiled_branch_runs_compiled(dynamo_counter):
    fusion = RoutedFusion(choosing([0, 1], 2), [mlp(3), mlp(3)]).eval()
    plain = fusion(x := torch.randn(2, FEATURES, dtype=torch.float64))
    fusion.branches[0].compile(backend=dynamo_counter)
    with torch.no_grad():
        assert torch.equal(fusion(x), plain)
    assert dynamo_counter.frame_count == 1


@pytest.fixture
def dynamo_counter():
    from torch._dynamo.testing import CompileCounter

    yield CompileCounter()
    torch._dynamo.reset()
    gc.collect()


class Frozen(Exception):
    """Takes no notes."""

    def __setattr__(self, name, value):
        if name == "__notes__":
            raise AttributeError(name)
        super().__setattr__(name, value)


class Coded(OSError):
    def __init__(self, number: int, text: str):
        super().__init__(number, text)
        self.code = number


ERRORS = [
    ValueError("wrong"),
    KeyError("key"),
    OSError(2, "no such file", "name"),
    Coded(7, "seven"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "why"),
    RuntimeError(),
    StopIteration(3),
    RecursionError("deep"),
]


def raising(error: BaseException) -> nn.Module:
    def fail(*_):
        raise error

    return Function(fail)


@for_splits
@for_grads
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_exceptions_keep_type_arguments_and_fields(error, grad, split):
    args, fields = error.args, {**vars(error)}
    fusion = RoutedFusion(choosing(split, 2), {"a": nn.Identity(), "b": raising(error)}).train(grad)
    for _ in range(3):
        with torch.set_grad_enabled(grad), pytest.raises(type(error)) as caught:
            fusion(torch.ones(4, 2))
    assert caught.value is error
    assert error.args == args
    assert {k: v for k, v in vars(error).items() if k != "__notes__"} == fields
    assert error.__notes__ == ["in branch 'b'"]
    del error.__notes__


def test_an_exception_that_takes_no_notes_is_raised_as_it_is():
    fusion = RoutedFusion(choosing([0, 1], 2), [nn.Identity(), raising(Frozen("ice"))])
    with pytest.raises(Frozen, match="ice"):
        fusion(torch.ones(2, 2))


def test_nested_fusions_name_the_way():
    inner = RoutedFusion(choosing([0, 1], 2), {"in": nn.Identity(), "wrong": raising(KeyError(1))})
    outer = RoutedFusion(choosing([1, 1], 2), {"other": nn.Identity(), "inner": inner})
    with pytest.raises(KeyError) as caught:
        outer(torch.ones(2, 2))
    assert caught.value.__notes__ == ["in branch 'wrong'", "in branch 'inner'"]


@for_splits
def test_what_a_lazy_modality_raises_names_the_branch(split):
    def fetch(indices):
        raise OSError(5, "disk")

    branches = {"a": Branch(mlp(2), inputs=[0]), "b": Branch(mlp(2), inputs=[1])}
    fusion = RoutedFusion(Branch(choosing(split, 2), inputs=[0]), branches)
    with pytest.raises(OSError, match="disk") as caught:
        fusion(torch.randn(4, FEATURES, dtype=torch.float64), Lazy(fetch))
    assert caught.value.__notes__ == ["in branch 'b'"]
    assert caught.value.args == (5, "disk")


@for_splits
def test_each_lazy_modality_gets_indices_of_its_own(split):
    store = torch.arange(8.0).view(4, 2)

    def greedy(indices):
        rows = store[indices]
        indices.zero_()
        return rows

    module = Function(lambda x, y, z: torch.cat([y, z], 1))
    fusion = RoutedFusion(Branch(choosing(split, 2), inputs=[0]), [module, module])
    out = fusion(torch.zeros(4, 1), Lazy(greedy), Lazy(greedy))
    assert torch.equal(out, torch.cat([store, store], 1))


def test_a_gate_that_raises_is_named():
    fusion = RoutedFusion(raising(ZeroDivisionError("zero")), toy(2)[1])
    with pytest.raises(ZeroDivisionError) as caught:
        fusion(torch.randn(2, FEATURES))
    assert caught.value.__notes__ == ["in the gate"]
