"""A selection for each branch, batches that nobody answers, masks with weights or of one branch."""

import pytest
import torch
from torch import Tensor

from dynmm_kernels import Shared, combine, gather, route

MASK = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 0, 0]]).bool()


def learning(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def rows_of(mask: Tensor, branch: int) -> list[int]:
    return [n for n, row in enumerate(mask.tolist()) if row[branch]]


def test_each_branch_gets_what_it_selects():
    a, b, c = learning(5, 2), learning(5, 3), torch.arange(5)
    plan = route(MASK, 3)
    first, second, third = gather(plan, [a, b, c], select=[[0], [2, 1], 2])
    assert [type(first), type(second)] == [list, list]
    assert torch.equal(first[0], a[rows_of(MASK, 0)])
    assert torch.equal(second[0], c[rows_of(MASK, 1)])
    assert torch.equal(second[1], b[rows_of(MASK, 1)])
    assert torch.equal(third, c[rows_of(MASK, 2)])
    (first[0].sum() + 2 * second[1].sum()).backward()
    assert torch.equal(a.grad, MASK[:, :1].double().expand(5, 2))
    assert torch.equal(b.grad, 2 * MASK[:, 1:2].double().expand(5, 3))


def test_a_selection_by_key():
    parts = {"x": learning(5, 2), "y": (learning(5, 1), None), "z": Shared(torch.ones(7))}
    first, second, third = gather(route(MASK, 3), parts, select=["x", ["y", "z"], []])
    assert torch.equal(first, parts["x"][rows_of(MASK, 0)])
    assert list(second) == ["y", "z"]
    assert torch.equal(second["y"][0], parts["y"][0][rows_of(MASK, 1)])
    assert second["y"][1] is None
    assert second["z"] is parts["z"].tensor
    assert third == {}


def test_what_is_selected_twice_gets_both_gradients():
    x = learning(5, 2)
    ours = gather(route(MASK, 3), (x,), select=[[0, 0], [0], []])
    assert isinstance(ours[0], tuple)
    (ours[0][0] * 2 + ours[0][1] * 5).sum().backward()
    assert torch.equal(x.grad, 7 * MASK[:, :1].double().expand(5, 2))


def test_what_nobody_selects_does_not_move(monkeypatch):
    moved = []
    real = torch.ops.dynmm_kernels.gather_rows
    x, other = torch.randn(5, 2), torch.randn(5, 400)

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is real.default:
                moved.extend(args[0])
            return func(*args, **(kwargs or {}))

    with Watching():
        gather(route(MASK, 3), [x, other], select=[0, 0, 0])
    assert {tensor.shape for tensor in moved} == {x.shape}


@pytest.mark.parametrize(
    ("tensors", "select", "error", "said"),
    [
        (torch.ones(5), [0, 0, 0], TypeError, "a list, a tuple or a dict.*got Tensor"),
        ([torch.ones(5)], [0, 0], ValueError, "one selection per branch, 3; got 2"),
        ([torch.ones(5)], 0, TypeError, "select must be a sequence.*got int"),
        ([torch.ones(5)], [0, 1, 0], ValueError, "branch 1 selects 1; there are 1 tensors"),
        ([torch.ones(5)], [0, "x", 0], ValueError, "branch 1 selects 'x'; there are 1 tensors"),
        ({"x": torch.ones(5)}, ["x", "x", ["y"]], ValueError, "branch 2 selects 'y'; there are 'x"),
    ],
)
def test_selections_that_do_not_fit_are_named(tensors, select, error, said):
    with pytest.raises(error, match=f"gather: .*{said}"):
        gather(route(MASK, 3), tensors, select=select)


NOBODY = torch.full((4,), -1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_batch_that_nobody_answers_has_zeros(device):
    plan = route(NOBODY, 2)
    like = {"a": torch.ones(9, 3, dtype=torch.float64, device=device), "b": (None, 2)}
    out = combine(plan, [None, None], like=like)
    assert torch.equal(out["a"], torch.zeros(4, 3, dtype=torch.float64))
    assert out["b"] == (None, 2)
    assert torch.equal(combine(plan, [None, None], like=like["a"][:0]), out["a"])


def test_rows_there_are_need_no_likeness():
    plan = route(torch.tensor([1, -1]), 2)
    out = combine(plan, [None, torch.ones(1, 3)], like=torch.ones(2, 7))
    assert torch.equal(out, torch.tensor([[1.0, 1, 1], [0, 0, 0]]))


def test_a_shape_that_nobody_knows():
    with pytest.raises(ValueError, match=r"every output is None.*like="):
        combine(route(NOBODY, 2), [None, None])
    with pytest.raises(ValueError, match=r"like must hold tensors with rows.*0 dimensions"):
        combine(route(NOBODY, 2), [None, None], like=torch.tensor(1.0))


@pytest.mark.parametrize("outputs", [[torch.ones(1, 2), None, None], [None, None, None]])
@pytest.mark.parametrize("like", [None, torch.ones(0, 2)])
def test_a_branch_with_rows_and_no_output_is_named(outputs, like):
    plan = route(torch.tensor([1, 0, 1]), 3)
    number, count = (1, 2) if outputs[0] is not None else (0, 1)
    with pytest.raises(ValueError, match=f"branch {number} has {count} rows but no output"):
        combine(plan, outputs, like=like)


@pytest.mark.parametrize("mask", [MASK, MASK[:0], torch.zeros(5, 3, dtype=torch.bool)])
def test_weights_of_every_branch_beside_a_mask(mask):
    """weights[n, b] is branch b's, whoever else the sample has; all gradients."""
    size = len(mask)
    x, weights = learning(size, 4), learning(size, 3)
    matrices = [learning(4, 2) for _ in range(3)]
    plan = route(mask, 3)
    rows = gather(plan, x)
    outputs = [(part @ matrix).sin() for part, matrix in zip(rows, matrices, strict=True)]
    ours = combine(plan, outputs, weights)
    oracle = sum(
        (mask[:, b] * weights[:, b])[:, None] * (x @ matrix).sin()
        for b, matrix in enumerate(matrices)
    )
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    upstream, learners = torch.randn_like(oracle), [x, weights, *matrices]
    got = torch.autograd.grad(ours, learners, upstream)
    wanted = torch.autograd.grad(oracle, learners, upstream)
    for a, e in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [[True, False, True], [False, False], []])
def test_a_mask_of_one_branch_may_be_flat(mask):
    mask = torch.tensor(mask, dtype=torch.bool)
    flat, column = route(mask, 1), route(mask[:, None], 1)
    assert flat.counts == column.counts == (int(mask.sum()),)
    assert torch.equal(flat.order, column.order)
    assert torch.equal(flat.inverse, column.inverse)
    with pytest.raises(ValueError, match="bool mask"):
        route(mask, 2)
