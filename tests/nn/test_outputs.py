"""What branches may return: structures, dtypes, devices, and whose memory the result lies in."""

import pytest
import torch
from models import FEATURES, Function, assert_close, choosing, mlp, toy
from torch import Tensor, nn

from dynmm_kernels import Branch, RoutedFusion, Shared, combine, resource_loss, route
from dynmm_kernels.functional import sorting

SPLITS = [[0, 1, 1, 0], [1, 1, 1, 1]]
WAYS = ["serving", "eval", "training", "no gate", "masked", "multi_hot"]

for_splits = pytest.mark.parametrize("split", SPLITS)
for_ways = pytest.mark.parametrize("way", WAYS)


def run(way: str, split: list[int], branches, *inputs, **options):
    """The fusion of two branches, decided as planned, in one of the ways it can run."""
    gate = choosing(split, 2)
    if way == "multi_hot":
        gate.logits.data -= 1
        options["select"] = "multi_hot"
    execution = "masked" if way == "masked" else "routed"
    fusion = RoutedFusion(gate, branches, execution=execution, **options)
    if way in ("serving", "eval"):
        fusion.eval()
    choice = torch.tensor(split) if way == "no gate" else None
    with torch.set_grad_enabled(way != "serving"):
        return fusion(*inputs, choice=choice)


def picked(split, *outputs: Tensor) -> Tensor:
    return torch.stack([outputs[b][n] for n, b in enumerate(split)])


def rows() -> Tensor:
    return torch.randn(4, FEATURES, dtype=torch.float64)


@for_splits
@for_ways
def test_none_and_numbers_beside_tensors(way, split):
    x = rows()
    branches = [Function(lambda x, s=s: (x * s, None, {"loss": 3, "flag": "a"})) for s in (2, 5)]
    first, second, third = run(way, split, branches, x)
    assert_close(first, picked(split, 2 * x, 5 * x))
    assert second is None
    assert third == {"loss": 3, "flag": "a"}


class Tagged(Tensor):
    """A subclass, as torch's own wrappers are."""


@for_splits
@for_ways
def test_subclasses_and_parameters_beside_plain_tensors(way, split):
    x, table = rows(), nn.Parameter(rows())
    tagged = Function(lambda x: (x * 2).as_subclass(Tagged))
    out = run(way, split, [tagged, Function(lambda x: x * 5)], x)
    assert_close(torch.Tensor(out), picked(split, 2 * x, 5 * x))
    branches = [Function(lambda x: nn.Parameter(x * 2)), Function(lambda x: table[: len(x)])]
    if split == SPLITS[1]:
        assert_close(run(way, split, branches, x).detach(), table.detach())


@pytest.mark.parametrize("way", ["training", "no gate"])
def test_several_subclasses_where_a_branch_is_starved(way):
    x = rows()
    table = nn.Linear(FEATURES, FEATURES).double()
    branches = [
        Function(lambda x: (x.as_subclass(Tagged), (x * 2).as_subclass(Tagged))),
        Function(lambda x: (table(x), table(x))),
    ]
    branches[1].table = table
    first, second = run(way, [0] * 4, branches, x)
    assert_close(first.detach().as_subclass(Tensor), x)
    assert_close(second.detach().as_subclass(Tensor), 2 * x)
    (first.sum() + second.sum()).backward()
    assert not table.weight.grad.any()


@for_splits
@for_ways
def test_dicts_of_the_same_keys_in_any_order(way, split):
    x = rows()
    branches = [
        Function(lambda x: {"a": x, "b": [x * 2, x * 3]}),
        Function(lambda x: {"b": [x * 4, x * 5], "a": x * 6}),
    ]
    out = run(way, split, branches, x)
    assert_close(out["a"], picked(split, x, 6 * x))
    assert_close(out["b"], [picked(split, 2 * x, 4 * x), picked(split, 3 * x, 5 * x)])


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (lambda x: x, r"tensor\[2, 6\] against {'a': tensor\[2, 6\], 'b': None}"),
        (lambda x: {"a": x, "c": None}, r"{'a': tensor\[2, 6\], 'c': None} against {'a'"),
        (lambda x: {"a": {"b": x}, "b": None}, r"{'a': {'b': tensor\[2, 6\]}, 'b': None} against"),
        (lambda x: ({"a": x}, None), r"\({'a': tensor\[2, 6\]}, None\) against {'a'"),
    ],
)
@pytest.mark.parametrize("way", ["serving", "training", "no gate"])
def test_another_structure_is_shown(way, second, said):
    branches = [Function(lambda x: {"a": x, "b": None}), Function(second)]
    with pytest.raises(ValueError, match=f"branch '1' returns another structure .*: {said}"):
        run(way, [0, 1, 1, 0], branches, rows())


@for_splits
@pytest.mark.parametrize("way", ["serving", "eval", "training"])
def test_autocast_with_branches_that_end_in_different_dtypes(way, split):
    class Float(nn.Linear):
        def forward(self, x):
            return super().forward(x).float()

    class Both(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x), 1

    x = torch.randn(4, FEATURES)
    branches = [nn.Linear(FEATURES, 3), Float(FEATURES, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(way, split, branches, x)
        nested, _ = run(way, split, [Both(branch) for branch in branches], x)
        expected = picked(split, *(branch(x).float() for branch in branches))
    assert plain.dtype == nested.dtype == torch.float32
    assert torch.equal(plain, expected)
    assert torch.equal(nested, expected)


class Normed(nn.Module):
    """A branch whose rows depend on the batch, and which then makes a mistake."""

    def __init__(self, mistake):
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES, dtype=torch.float64)
        self.mistake = mistake

    def forward(self, x):
        return self.mistake(self.norm(x))


@pytest.mark.parametrize("way", ["training", "no gate"])
@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (lambda y: y.sum(), r"must be a tensor of shape \[4, \.\.\.\]"),
        (lambda y: y.mean(0), r"must have 4 rows.*got shape \[6\]"),
        (lambda y: y[:1], r"must have 4 rows.*got shape \[1, 6\]"),
        (lambda y: (y, y[:3]), r"output 1 must have 4 rows"),
        (lambda y: (y, y.to("meta")), r"output 1 is on meta; it must be on cpu"),
    ],
)
def test_rows_of_a_branch_with_batch_norm_are_checked(mistake, said, way):
    with pytest.raises(ValueError, match=f"branch '0': .*{said}"):
        run(way, [0, 1, 1, 0], [Normed(mistake), Normed(mistake)], rows())


@for_splits
@pytest.mark.parametrize("way", ["training", "no gate", "masked"])
def test_none_and_numbers_behind_batch_norm(way, split):
    x = rows()
    branches = [Normed(lambda y: (y, None, 3)), Normed(lambda y: (2 * y, None, 3))]
    out, *others = run(way, split, branches, x)
    plain = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    assert_close(out.detach(), picked(split, plain, 2 * plain), 1e-12)
    assert others == [None, 3]


@for_splits
@pytest.mark.parametrize("way", ["serving", "eval", "training", "no gate", "masked"])
@pytest.mark.parametrize("leaf", [lambda y: y, lambda y: {"y": y}], ids=["plain", "dict"])
def test_outputs_on_another_device_are_named(leaf, way, split):
    branches = [mlp(3), Function(lambda x: leaf(torch.empty(len(x), 3, device="meta")))]
    branches = [Function(lambda x, m=branches[0]: leaf(m(x))), branches[1]]
    with pytest.raises(ValueError, match=r"branch '1': output 0 is on meta; it must be on cpu"):
        run(way, split, branches, rows())


@pytest.mark.parametrize("way", ["serving", "eval", "training", "masked"])
def test_logits_on_another_device_are_named(way):
    gate = Function(lambda x: torch.zeros(len(x), 2, device="meta"))
    fusion = RoutedFusion(gate, [mlp(3), mlp(3)], execution="masked" if way == "masked" else "auto")
    fusion.train(way == "training")
    with (
        torch.set_grad_enabled(way != "serving"),
        pytest.raises(ValueError, match="must return logits on cpu, as its inputs are; got meta"),
    ):
        fusion(rows())


def test_outputs_and_weights_of_combine_on_another_device_are_named(backend):
    plan = route(torch.tensor([0, 1, 0]), 2)
    ones = [torch.ones(2, 3), torch.ones(1, 3)]
    with pytest.raises(ValueError, match="branch 1: output 0 is on meta"):
        combine(plan, [ones[0], ones[1].to("meta")])
    with pytest.raises(ValueError, match="the plan is on cpu, the weights are on meta"):
        combine(plan, ones, torch.ones(3, device="meta"))


@for_splits
@pytest.mark.parametrize("way", ["serving", "eval", "training", "no gate"])
def test_outputs_that_are_not_strided_are_named(way, split):
    branches = [mlp(3), Function(lambda x: torch.ones(len(x), 3).double().to_sparse_csr())]
    with pytest.raises(TypeError, match=r"branch '1': output 0 must be strided; got torch.sparse"):
        run(way, split, branches, rows())


class Keeper(nn.Module):
    """Returns tensors that it keeps: a parameter, a buffer, a view of either, what it was given."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("table", torch.randn(4, 3))

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        kept = {"parameter": self.weight, "buffer": self.table, "shared": shared}
        kept |= {"view": self.weight[:, :2], "buffer view": self.table[:, 1:], "input": x}
        return kept[self.what]


KEPT = ["parameter", "buffer", "view", "buffer view", "shared", "input"]


@pytest.mark.parametrize("way", ["serving", "eval", "no gate", "training"])
@pytest.mark.parametrize("what", KEPT)
def test_the_result_is_nobody_elses_memory(what, way):
    """Whoever got all rows: writing into the result must not change the model or the batch."""
    keeper, x, shared = Keeper(what), torch.randn(4, 3), torch.randn(4, 3)
    held = [x, shared, keeper.weight, keeper.table]
    before = [tensor.detach().clone() for tensor in held]
    out = run(way, [1, 1, 1, 1], [keeper, keeper], x, Shared(shared))
    with torch.no_grad():
        out.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_the_short_way_copies_buffers_it_returns():
    """Plain inputs, no graph: as models are served."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(4, 3))

        def forward(self, x):
            return self.table

    table = Table()
    before = table.table.clone()
    with torch.no_grad():
        RoutedFusion(choosing([1] * 4, 2), [mlp(3), table]).eval()(rows()).zero_()
    assert torch.equal(table.table, before)


@for_splits
@pytest.mark.parametrize("way", ["serving", "training", "eval"])
def test_bool_outputs_of_several_branches_are_refused_whatever_was_chosen(way, split):
    gate = choosing(split, 2)
    gate.logits.data -= 1
    branches = [Function(lambda x: x > 0), Function(lambda x: x < 0)]
    fusion = RoutedFusion(gate, branches, select="multi_hot").train(way == "training")
    with (
        torch.set_grad_enabled(way != "serving"),
        pytest.raises(TypeError, match="bool outputs"),
    ):
        fusion(rows())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.complex128])
def test_uniform_is_as_precise_as_the_outputs(dtype):
    outputs = [torch.randn(5, 3, dtype=dtype) for _ in range(3)]
    fusion = RoutedFusion(mlp(3), [Function(lambda x, y=y: y) for y in outputs])
    got, routing = fusion(torch.ones(5, FEATURES), choice="uniform", return_routing=True)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = sum(y.to(wide) for y in outputs) / 3
    assert got.dtype == dtype
    error = (got.to(wide) - expected).abs().max() / expected.abs().max()
    assert error <= 2 * torch.finfo(dtype).eps
    assert routing.probs.dtype == torch.float32


def test_zeros_come_through_whichever_output_the_loss_uses():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = mlp(3)

        def forward(self, x):
            y = self.linear(x)
            return {"first": y, "count": torch.ones(len(x), dtype=torch.int64), "second": 2 * y}

    for key in ("first", "second"):
        branches = [Two(), Two()]
        out = RoutedFusion(mlp(2), branches, execution="routed")(rows(), choice=0)
        out[key].sum().backward()
        for parameter in branches[1].parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
        assert all(parameter.grad.any() for parameter in branches[0].parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_zeros_come_through_complex_outputs(frozen):
    branches = [nn.Sequential(mlp(3), Function(lambda y: torch.complex(y, y))) for _ in range(2)]
    branches[0].requires_grad_(not frozen)
    out = RoutedFusion(mlp(2), branches, execution="routed")(rows(), choice=0)
    out.abs().sum().backward()
    assert all(not parameter.grad.any() for parameter in branches[1].parameters())


def test_zeros_of_sparse_embeddings_are_sparse():
    """SparseAdam takes no others."""
    branches = [nn.Embedding(5, 3, sparse=True), nn.EmbeddingBag(5, 3, sparse=True, mode="sum")]
    branches[0] = nn.Sequential(branches[0], Function(lambda y: y.sum(1)))
    for choice in (0, 1):
        fusion = RoutedFusion(mlp(2), branches, execution="routed")
        fusion(torch.randint(0, 5, (4, 2)), choice=choice).sum().backward()
        weights = [branches[0][0].weight, branches[1].weight]
        assert all(weight.grad.is_sparse for weight in weights)
        assert not weights[1 - choice].grad.to_dense().any()
        torch.optim.SparseAdam(weights).step()
        for weight in weights:
            weight.grad = None


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda r: resource_loss(None), TypeError, "wanted a Routing.*got NoneType"),
        (lambda r: resource_loss([r, None]), TypeError, "wanted a Routing.*got NoneType"),
        (lambda r: resource_loss(r, "ab"), TypeError, "costs must be numbers.*got 'ab'"),
        (lambda r: route(torch.tensor([0]), 2.0), TypeError, "num_branches must be an int.*float"),
        (lambda r: route(torch.tensor([0]), True), TypeError, "num_branches must be an int.*bool"),
        (
            lambda r: route(torch.tensor([0]), 2**40),
            ValueError,
            r"in 1\.\.1048576; got 1099",
        ),
        (lambda r: RoutedFusion(mlp(2), None), TypeError, "branches must be a sequence or a dict"),
        (lambda r: RoutedFusion(*toy(2), temperature=True), ValueError, "got True"),
        (lambda r: Branch(mlp(2), inputs=True), TypeError, "keys, positions or a callable; got T"),
    ],
)
def test_unclear_arguments_are_named(call, error, said):
    _, routing = RoutedFusion(*toy(2))(rows(), return_routing=True)
    with pytest.raises(error, match=said):
        call(routing)


def test_combine_names_a_branch_with_rows_and_no_output():
    plan = route(torch.tensor([0, 1, 1]), 3)
    with pytest.raises(ValueError, match="branch 1 has 2 rows but no output"):
        combine(plan, [torch.ones(1, 2), None, None])


def expanded(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, 1, dtype=dtype).expand(rows, columns)


def test_more_entries_than_slots_are_refused():
    """Before anything of that size is computed."""
    plan = route(torch.zeros(2**16, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 2 entries.*got 2147549184"):
        sorting.route_complement(plan, expanded(2**16, 2**15, torch.bool))
    undefined = expanded(2**16, 1, torch.bool)
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 2 entries.*got 2147483648"):
        sorting.route_unless(expanded(2**16, 2**15, torch.int64), undefined, 2**15)
    with pytest.raises(RuntimeError, match=r"route_argmax: at most 2147483646 entries"):
        sorting.route_argmax(expanded(2**31, 2, torch.float32))
