"""Gradients of gather and combine: exact in fp64, to any order, accurate below, always the same."""

from itertools import chain

import oracle
import pytest
import torch
from tensors import SELECTIONS, TOP1, oracle_plan, random_selection, row_values, selection_of
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from dynmm_kernels import RoutingPlan, combine, gather, route
from dynmm_kernels.functional import autograd

pytestmark = pytest.mark.usefixtures("backend")

LOW = [torch.float32, torch.float16, torch.bfloat16]


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def leaves_of(plan: RoutingPlan, *row_shape: int, dtype=torch.float64) -> list[Tensor]:
    return [leaf(count, *row_shape, dtype=dtype) for count in plan.counts]


def with_rows(outputs: list[Tensor]) -> list[Tensor]:
    return [y for y in outputs if len(y)]


def detached(tensors, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def plain_gather(plan: RoutingPlan, x: Tensor) -> list[Tensor]:
    return [x[plan.rows(branch)] for branch in range(plan.num_branches)]


def plain_combine(plan: RoutingPlan, outputs: list[Tensor], weights: Tensor | None) -> Tensor:
    """What a user would write: PyTorch's own gradients, in the precision of the arguments."""
    padded = torch.cat([*outputs, outputs[0].new_zeros(1, *outputs[0].shape[1:])])
    taken = padded[plan.inverse.long()]  # slot -1 is the row of zeros
    if weights is not None:
        taken = taken * weights.to(taken.dtype).reshape(*weights.shape, *[1] * (taken.dim() - 2))
    return taken.sum(1)


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the scale of the exact values."""
    if exact.numel() == 0:
        return 0.0
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)).item()


def check_both_orders(function, inputs) -> None:
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.fixture(params=SELECTIONS)
def plan(request) -> RoutingPlan:
    return route(*selection_of(request.param))


def test_gather_gradcheck(plan):
    x, y = leaf(plan.num_rows, 2), leaf(plan.num_rows)
    check_both_orders(lambda x, y: list(chain(*gather(plan, [x, y]))), (x, y))


def test_combine_gradcheck(plan):
    check_both_orders(lambda *outputs: combine(plan, outputs), leaves_of(plan, 2))


def test_weighted_combine_gradcheck(plan):
    weights = leaf(plan.num_rows, plan.ranks)
    check_both_orders(
        lambda weights, *outputs: combine(plan, outputs, weights), (weights, *leaves_of(plan, 2))
    )


@pytest.mark.parametrize("row_shape", [(), (0,), (2, 1, 2)], ids=str)
def test_gradcheck_of_row_shapes(row_shape):
    plan = route(torch.tensor([[0, 1], [2, -1], [2, 0]]), 4)
    x, weights = leaf(3, *row_shape), leaf(3, 2)
    check_both_orders(lambda x: gather(plan, x), x)
    check_both_orders(
        lambda weights, *outputs: combine(plan, outputs, weights),
        (weights, *leaves_of(plan, *row_shape)),
    )


def test_flat_weights_gradcheck():
    plan = route(torch.tensor([1, 0, -1, 1]), 3)
    check_both_orders(
        lambda weights, *outputs: combine(plan, outputs, weights), (leaf(4), *leaves_of(plan, 3))
    )


def test_gradcheck_of_a_weighted_gather_of_two_tensors():
    """The weights learn from both."""
    plan = route(torch.tensor([1, 0, 1]), 2)
    starts, stops = [1, 0, 1], [3, 1, 3]

    def call(weights, *sources):
        rows = autograd.gather(plan, [*sources], [0, 1, 1], starts, stops, weights)
        return torch.cat(rows)

    check_both_orders(call, (leaf(3, 1), leaf(3, 2), leaf(3, 2)))


def test_complex_gradcheck():
    plan = route(torch.tensor([1, 0, -1, 1]), 3)
    x = torch.randn(4, 2, dtype=torch.complex128, requires_grad=True)
    check_both_orders(lambda x: combine(plan, gather(plan, x)), x)


@pytest.mark.parametrize("trainable", [(True, False), (False, True)])
def test_gradcheck_of_some_arguments(trainable):
    """Only the weights, only the outputs of one branch."""
    plan = route(torch.tensor([[0, 0], [0, 1]]), 2)
    weights, first, second = leaf(2, 2), leaf(3, 2), leaf(1, 2).detach()
    weights.requires_grad_(trainable[0])
    first.requires_grad_(trainable[1])
    check_both_orders(lambda w, *outputs: combine(plan, outputs, w), (weights, first, second))


def test_starved_outputs_stay_in_the_graph():
    """As with torch.cat: what made the 0 rows gets zero gradients, not None (which stalls DDP)."""
    plan = route(torch.tensor([0, 0]), 2)
    x, layer = leaf(2, 3), torch.nn.Linear(3, 2).double()
    outputs = [part.detach()[:, :2] if len(part) else layer(part) for part in gather(plan, x)]
    result = combine(plan, outputs)
    assert result.requires_grad
    result.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_of_any_order(plan, order):
    """Against PyTorch's derivatives of the same function, through gather and combine together."""
    x, weights = leaf(plan.num_rows, 3), leaf(plan.num_rows, plan.ranks)

    def derivative(gather_rows, combine_rows) -> tuple[Tensor, ...]:
        parts = [part.sin() * (b + 1) for b, part in enumerate(gather_rows(plan, x))]
        values = (combine_rows(plan, parts, weights.exp()),)
        for _ in range(order):
            total = sum((value * value).sum() for value in values)
            values = grad(total, (x, weights), create_graph=True)
        return values

    for actual, exact in zip(
        derivative(gather, combine), derivative(plain_gather, plain_combine), strict=True
    ):
        assert error(actual, exact) <= 1e-13


def test_fp64_against_the_loop():
    """Forward and every gradient of a weighted combine against one sample at a time."""
    selection = random_selection(33, 3, 4)
    plan, expected = route(selection, 4), oracle_plan(selection, 4)
    outputs, weights, cotangent = leaves_of(plan, 7), leaf(33, 3), torch.randn(33, 7).double()
    result = combine(plan, outputs, weights)
    d_weights, *d_outputs = grad(result, [weights, *outputs], cotangent)
    rows = [row_values(y) for y in outputs]
    w, g = weights.tolist(), cotangent.tolist()
    exact = oracle.combine(rows, expected, [0.0] * 7, w)
    assert error(result, torch.tensor(exact, dtype=torch.float64)) <= 1e-15
    dots = oracle.row_dots(g, rows, expected.starts(), expected.inverse)
    assert error(d_weights, torch.tensor(dots, dtype=torch.float64)) <= 1e-15
    for branch, d_output in enumerate(d_outputs):
        start, stop = expected.offsets[branch : branch + 2]
        exact = oracle.gather_rows(g, start, stop, expected.order, expected.ranks, w)
        assert torch.equal(d_output, torch.tensor(exact, dtype=torch.float64))


# Incoming gradients as autograd really gives them: expanded by sum(), transposed by a matmul.
COTANGENTS = {
    "one value expanded": lambda y: torch.randn((), dtype=y.dtype).expand(y.shape),
    "one row expanded": lambda y: torch.randn(y.shape[1:], dtype=y.dtype).expand(y.shape),
    "one column expanded": lambda y: torch.randn_like(y[..., :1]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.shape[::-1], dtype=y.dtype).permute(2, 1, 0),
    "every other row": lambda y: torch.randn(2 * len(y), *y.shape[1:], dtype=y.dtype)[::2],
    "every other column": lambda y: torch.randn(*y.shape, 2, dtype=y.dtype)[..., 1],
}


@pytest.mark.parametrize("layout", COTANGENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_incoming_gradients_of_any_layout(plan, layout, dtype):
    """As from a contiguous copy: the same bits, but for the order in which a row dot is summed."""
    precision = torch.promote_types(dtype, torch.float32)
    x, weights = leaf(plan.num_rows, 3, 2, dtype=dtype), leaf(*plan.inverse.shape, dtype=precision)
    outputs = leaves_of(plan, 3, 2, dtype=dtype)
    for values, inputs in (
        (gather(plan, x), [x]),
        ([combine(plan, outputs, weights)], [*with_rows(outputs), weights]),
    ):
        awkward = [COTANGENTS[layout](value) for value in values]
        actual = grad(values, inputs, awkward, retain_graph=True)
        expected = grad(values, inputs, [cotangent.contiguous() for cotangent in awkward])
        for a, e, leaf_ in zip(actual, expected, inputs, strict=True):
            if leaf_ is weights:
                assert error(a, e.double()) <= 4 * torch.finfo(precision).eps
            else:
                assert torch.equal(a, e)


def test_sum_backward(plan):
    """The commonest one: stride 0 from sum(). Each row gets as many ones as it has branches."""
    x = leaf(plan.num_rows, 3)
    torch.cat(gather(plan, x)).sum().backward()
    uses = (plan.inverse >= 0).sum(1, keepdim=True).double()
    assert torch.equal(x.grad, uses.expand(-1, 3))
    outputs = leaves_of(plan, 3)
    combine(plan, outputs).sum().backward()
    for y in with_rows(outputs):
        assert torch.equal(y.grad, torch.ones_like(y))


def test_gather_of_rows_nobody_uses():
    """Only branch 1 reaches the loss; the rows of the others get zero."""
    plan = route(torch.tensor([0, 1, -1, 2, 1]), 3)
    x, tokens = leaf(5, 2), torch.arange(5)
    parts = gather(plan, {"x": x, "tokens": tokens, "frozen": x.detach()})
    assert not parts[1]["tokens"].requires_grad
    assert not parts[1]["frozen"].requires_grad
    parts[1]["x"].sum().backward()
    assert x.grad.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0], [1, 1]]


def test_combine_of_a_tree_with_leaves_without_gradients():
    plan = route(torch.tensor([[0, 1], [1, 1]]), 2)
    outputs = [{"y": leaf(n, 2), "n": torch.ones(n, dtype=torch.int64)} for n in plan.counts]
    result = combine(plan, outputs)
    assert result["n"].tolist() == [2, 2]
    assert not result["n"].requires_grad
    result["y"].sum().backward()
    assert all(torch.equal(y["y"].grad, torch.ones_like(y["y"])) for y in outputs)


def test_no_graph_where_none_is_wanted(plan):
    x, outputs = leaf(plan.num_rows, 2), leaves_of(plan, 2)
    with torch.no_grad():
        results = [*gather(plan, x), combine(plan, outputs)]
    results += gather(plan, x.detach())
    results.append(combine(plan, [y.detach() for y in outputs]))
    with torch.inference_mode():
        results += [*gather(plan, x), combine(plan, outputs)]
    assert not any(result.requires_grad for result in results)


def test_branches_may_work_in_place():
    plan = route(torch.tensor([0, 1, 0]), 2)
    x = leaf(3, 2)
    parts = [part.mul_(2).relu_() for part in gather(plan, x)]
    combine(plan, parts).sum().backward()
    assert torch.equal(x.grad, 2.0 * (x > 0))


def test_outputs_changed_after_combine():
    """The gradient of the weights needs them as they were."""
    plan = route(torch.tensor([0, 1, 0]), 2)
    outputs, weights = [torch.ones(n, 2) for n in plan.counts], torch.ones(3, requires_grad=True)
    result = combine(plan, outputs, weights)
    outputs[0].mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
    assert weights.grad is None


def accuracy_case(dtype: torch.dtype, weight_dtype: torch.dtype, ranks: int):
    """A weighted combine, its arguments, and a cotangent, all exact in the low precision."""
    plan = route(random_selection(257, ranks, 4), 4)
    outputs = leaves_of(plan, 67, dtype=dtype)
    weights = torch.rand(257, ranks).to(dtype).to(weight_dtype).requires_grad_()
    return plan, outputs, weights, torch.randn(257, 67).to(dtype)


def forward_and_gradients(combine_rows, plan, outputs, weights, cotangent) -> list[Tensor]:
    result = combine_rows(plan, outputs, weights)
    return [result, *grad(result, [weights, *outputs], cotangent.to(result.dtype))]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("weights_in_fp32", [True, False])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_accuracy_of_weighted_combine(dtype, weights_in_fp32, ranks):
    """At most 2x (forward) and 3x (gradients) the error of plain PyTorch in that precision."""
    weight_dtype = torch.float32 if weights_in_fp32 else dtype
    plan, outputs, weights, cotangent = accuracy_case(dtype, weight_dtype, ranks)
    actual = forward_and_gradients(combine, plan, outputs, weights, cotangent)
    assert [a.dtype for a in actual] == [dtype, weight_dtype] + [dtype] * 4
    plain = forward_and_gradients(plain_combine, plan, outputs, weights, cotangent)
    exact_weights, *exact_outputs = detached([weights, *outputs], torch.float64)
    exact = forward_and_gradients(plain_combine, plan, exact_outputs, exact_weights, cotangent)
    for allowed, a, p, e in zip([2, *[3] * 5], actual, plain, exact, strict=True):
        assert error(a, e) <= allowed * error(p, e)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_half_precision_is_rounded_once(dtype):
    """Accumulated in fp32: within one rounding of the exact result, whatever plain PyTorch does."""
    plan, outputs, weights, cotangent = accuracy_case(dtype, torch.float32, 4)
    exact_weights, *exact_outputs = detached([weights, *outputs], torch.float64)
    actual = forward_and_gradients(combine, plan, outputs, weights, cotangent)
    exact = forward_and_gradients(plain_combine, plan, exact_outputs, exact_weights, cotangent)
    ulp = torch.finfo(dtype).eps
    assert error(actual[0], exact[0]) <= (2 if dtype is torch.float32 else 0.51) * ulp
    assert error(actual[1], exact[1]) <= 8 * torch.finfo(torch.float32).eps
    assert all(error(a, e) <= 0.51 * ulp for a, e in zip(actual[2:], exact[2:], strict=True))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_accuracy_of_gather_gradients(dtype, ranks):
    """Rows that went to several branches add their gradients up in rank order, rounded once."""
    plan = route(random_selection(257, ranks, 4), 4)
    x = leaf(257, 5, dtype=dtype)
    parts = gather(plan, x)
    cotangents = [torch.randn_like(part) for part in parts]
    (actual,) = grad(parts, x, cotangents)
    rows = [row_values(cotangent) for cotangent in cotangents]
    selection = [[plan_branch(plan, slot) for slot in slots] for slots in plan.inverse.tolist()]
    expected = oracle.combine(rows, oracle.route(selection, 4, ranks), [0.0] * 5, cast=oracle.fp32)
    assert torch.equal(actual, torch.tensor(expected).to(dtype))


def plan_branch(plan: RoutingPlan, slot: int) -> int:
    return next((b for b in range(plan.num_branches) if 0 <= slot < plan.starts[b + 1]), -1)


@pytest.mark.parametrize("name", ["top2", "top3 with holes and repeats", *TOP1[:1]])
def test_double_precision_with_single_precision_weights(name):
    plan = route(*selection_of(name))
    outputs, weights = leaves_of(plan, 3), leaf(plan.num_rows, plan.ranks, dtype=torch.float32)
    result = combine(plan, outputs, weights)
    assert result.dtype == torch.float64
    assert error(result, plain_combine(plan, outputs, weights)) <= 1e-15
    assert grad(result.sum(), weights)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 3])
def test_same_bits_a_hundred_times(dtype, ranks, deterministic):
    selection = random_selection(2049, ranks, 5)
    weights = leaf(2049, ranks, dtype=torch.float32)
    x, cotangent = leaf(2049, 5, dtype=dtype), torch.randn(2049, 5).to(dtype)

    def run() -> list[Tensor]:
        plan = route(selection, 5)
        result = combine(plan, gather(plan, x), weights)
        return [plan.order, plan.inverse, result, *grad(result, [x, weights], cotangent)]

    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_do_not_depend_on_the_number_of_threads(dtype, restored_threads):
    plan = route(random_selection(20_000, 2, 5), 5)
    outputs, cotangent = leaves_of(plan, 33, dtype=dtype), torch.randn(20_000, 33).to(dtype)
    weights = leaf(20_000, 2, dtype=torch.float32)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(forward_and_gradients(combine, plan, outputs, weights, cotangent))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
