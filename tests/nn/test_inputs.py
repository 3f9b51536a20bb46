"""What a RoutedFusion reads: which inputs, which rows of them, fetched when and how often."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from models import (
    CHOICES,
    FEATURES,
    GATE_GRADS,
    MODES,
    FixedGate,
    Function,
    Planned,
    Touched,
    assert_close,
    assert_masked,
    assert_same,
    backward,
    choosing,
    masked_fusion,
    mlp,
    samples,
    toy,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynmm_kernels import Branch, Lazy, RoutedFusion, Shared, ops


class Mixture(nn.Module):
    """Reads three modalities of other shapes and another dtype."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.body, self.embedding = mlp(outputs), nn.Embedding(9, outputs).double()
        self.bilinear = nn.Bilinear(FEATURES, 4, outputs).double()

    def forward(self, x, image, token):
        return self.body(x) + self.bilinear(x, image.mean(2)) + self.embedding(token)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("execution", MODES)
def test_several_inputs(execution, choice):
    """Each of them in the order of its own branch's samples."""
    n = len(choice)
    gate, branches = Planned(Mixture(), torch.tensor(choice), 3), [Mixture() for _ in range(3)]
    inputs = samples(n), torch.randn(n, 4, 5, dtype=torch.float64), torch.randint(9, (n,))
    fusion = RoutedFusion(gate, branches, execution=execution)
    assert_masked(fusion, masked_fusion(gate, branches), [gate, *branches], inputs)


def test_the_gate_may_read_less_than_the_branches(call):
    gate = mlp(2, features=4)
    branches = [nn.Bilinear(FEATURES, 4, 3).double() for _ in range(2)]
    x, y = samples(7), samples(7, 4)
    expected = masked_fusion(lambda x, y: gate(y), branches)(x, y)
    fusion = RoutedFusion(Branch(gate, inputs=[1]), branches, execution="routed")
    assert_close(call(fusion, x, y), expected)


def test_a_scalar_is_not_per_sample(call):
    branches = [Function(lambda x, scale, b=b: x * scale + b) for b in range(2)]
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution="routed")
    x = samples(4)
    expected = 2 * x + torch.tensor([[0], [1], [1], [0]])
    assert_close(call(fusion, x, torch.tensor(2.0)), expected)


def test_only_what_a_branch_reads_is_touched():
    read, unread = samples(6), samples(6, 999)
    branches = [Branch(mlp(), inputs=["a"]), Branch(mlp(), inputs=["a"])]
    gate = Branch(choosing([0, 1, 0, 0, 1, 1], 2), inputs=["a"])
    for gate_grad in GATE_GRADS:
        fusion = RoutedFusion(gate, branches, execution="routed", gate_grad=gate_grad)
        with Touched() as touched:
            fusion({"a": read, "b": unread})
        assert read in touched
        assert unread not in touched


def test_a_modality_of_a_starved_branch_is_not_touched():
    cheap, costly = samples(6), samples(6, 999)
    branches = [
        Branch(mlp(), inputs=["cheap"]),
        Branch(mlp(features=999), inputs=["costly"]),
    ]
    gate = Branch(mlp(2), inputs=["cheap"])
    gate.module[2].bias.data[0] += 100
    fusion = RoutedFusion(gate, branches, execution="routed").eval()
    with torch.no_grad(), Touched() as touched:
        fusion({"cheap": cheap, "costly": costly})
    assert cheap in touched
    assert costly not in touched


class Recorder:
    """A fetch that notes the rows it is asked for."""

    def __init__(self, source: Tensor):
        self.source = source
        self.asked: list[list[int]] = []

    def __call__(self, rows: Tensor) -> Tensor:
        assert isinstance(rows, Tensor)
        assert rows.dtype is torch.int64
        assert rows.device.type == "cpu"
        assert rows.dim() == 1
        self.asked.append(rows.tolist())
        return self.source[rows]


def lazy_problem(choice: list[int], **options):
    """Branch 0 reads a tensor; 1 and 2 read the lazy modality too."""
    n = len(choice)
    fetch = Recorder(samples(n, 4))
    inputs = {"now": samples(n), "later": Lazy(fetch)}

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(features=FEATURES + 4)

        def forward(self, now, later):
            return self.body(torch.cat([now, later], 1))

    branches = [
        Branch(mlp(), inputs=["now"]),
        Branch(Both(), inputs=["now", "later"]),
        Branch(Both(), inputs=["now", "later"]),
    ]
    gate = Branch(choosing(choice, 3), inputs=["now"])
    return RoutedFusion(gate, branches, **options), inputs, fetch


@pytest.mark.parametrize("choice", [[0, 2, 1, 0, 2, 1, 1], [0, 0, 2, 2, 0], [1, 1, 1]])
def test_lazy_is_fetched_for_the_rows_that_need_it(choice):
    fusion, inputs, fetch = lazy_problem(choice, execution="routed")
    with torch.no_grad():
        output = fusion(inputs)
    wanted = [[n for n, b in enumerate(choice) if b == branch] for branch in (1, 2)]
    assert sorted(fetch.asked) == sorted(rows for rows in wanted if rows)
    whole = dict(inputs, later=fetch.source)
    with torch.no_grad():
        assert_close(output, fusion(whole))


def test_lazy_is_never_fetched_when_nobody_needs_it():
    fusion, inputs, fetch = lazy_problem([0, 0, 0], execution="routed", gate_grad="none")
    fusion(inputs)
    with torch.no_grad():
        fusion(inputs, choice=0)
    assert fetch.asked == []


@pytest.mark.parametrize("execution", MODES)
@pytest.mark.parametrize("choice", [[0, 2, 1, 0, 2], [0, 0, 0], [2, 2, 2]])
def test_lazy_training_equals_the_tensor(execution, choice):
    fusion, inputs, fetch = lazy_problem(choice, execution=execution)
    whole = dict(inputs, later=fetch.source)
    lazily = backward(lambda now: fusion(dict(inputs, now=now)), [fusion], (inputs["now"],))
    at_once = backward(lambda now: fusion(dict(whole, now=now)), [fusion], (inputs["now"],))
    assert_same(lazily, at_once)
    assert all(rows for rows in fetch.asked)


def test_lazy_alone_with_a_forced_choice():
    fetch = Recorder(samples(5))
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution="routed")
    choice = [2, 0, 0, -1, 2]
    output = fusion(Lazy(fetch), choice=torch.tensor(choice))
    for n, b in enumerate(choice):
        expected = branches[b](fetch.source)[n] if b >= 0 else torch.zeros(3).double()
        assert_close(output[n], expected)
    assert sorted(fetch.asked) == [[0, 4], [1, 2]]


def test_lazy_read_by_the_gate_is_fetched_whole():
    fetch = Recorder(samples(4))
    gate, branches = toy()
    branches = [Branch(branch, inputs=[0]) for branch in branches]
    fusion = RoutedFusion(Branch(gate, inputs=[1]), branches, execution="routed")
    with torch.no_grad():
        fusion(samples(4), Lazy(fetch))
    assert fetch.asked == [[0, 1, 2, 3]]


def first_tensor(inputs) -> Tensor:
    return next(x for x in tree_leaves(inputs) if isinstance(x, Tensor))


# name -> selector, how the fusion is called, whether the branch reads the image too
SELECTORS = {
    "keys": (["text", "image"], lambda d: (d,), True),
    "tuple of keys": (("text", "image"), lambda d: (d,), True),
    "one key": (["text"], lambda d: (d,), False),
    "positions of arguments": ([1, 0], lambda d: (d["image"], d["text"]), True),
    "positions of one list": ([1, 0], lambda d: ([d["image"], d["text"]],), True),
    "position of one tuple": ([1], lambda d: ((d["image"], d["text"]),), False),
    "callable, tuple": (lambda d: (d["text"], d["image"]), lambda d: (d,), True),
    "callable, tensor": (lambda d: d["text"], lambda d: (d,), False),
    "callable of two": (lambda i, t: (t, i), lambda d: (d["image"], d["text"]), True),
}


@pytest.mark.parametrize(("selector", "pack", "both"), SELECTORS.values(), ids=SELECTORS)
@pytest.mark.parametrize("execution", MODES)
def test_selectors(execution, selector, pack, both, call):
    """Every way of naming the modalities calls the branch as branch(text[, image])."""
    data = {"text": samples(5, 2), "image": samples(5, 3)}

    def reader(text, image=None):
        assert text.shape[1] == 2
        assert (image is not None) is both
        return text.sum(1) if image is None else text.sum(1) + 10 * image.sum(1)

    other = Function(lambda *inputs: torch.zeros_like(first_tensor(inputs)[:, 0]))
    gate = Branch(choosing([0, 1, 1, 0, 1], 2), inputs=lambda *inputs: first_tensor(inputs))
    fusion = RoutedFusion(gate, [Branch(Function(reader), inputs=selector), other])
    fusion.execution = execution
    expected = reader(data["text"], data["image"] if both else None)
    expected[[1, 2, 4]] = 0
    assert_close(call(fusion, *pack(data)), expected)


@pytest.mark.parametrize("execution", MODES)
def test_the_authors_nested_packs(execution, call):
    """[[video, audio, text], [their lengths]]: a list from a callable is one argument."""
    n, widths = 6, (2, 3, 4)
    pack = [[samples(n, w) for w in widths], [torch.randint(1, 9, (n,)) for _ in widths]]

    class Text(nn.Module):
        def forward(self, x):
            text, lengths = x
            return text.sum(1) / lengths

    class Everything(nn.Module):
        def forward(self, x):
            return sum(m.sum(1) / lengths for m, lengths in zip(*x, strict=True))

    class Gate(nn.Module):
        def forward(self, x):
            sequences, lengths = x
            assert len(sequences) == len(lengths) == 3
            return torch.stack([sequences[0].sum(1), sequences[1].sum(1)], dim=1)

    text = Branch(Text(), inputs=lambda x: [x[0][2], x[1][2]])
    fusion = RoutedFusion(Gate(), [text, Everything()], execution=execution)
    chosen = Gate()(pack).argmax(1)
    assert 0 < chosen.sum() < n
    expected = torch.where(chosen == 0, Text()([pack[0][2], pack[1][2]]), Everything()(pack))
    assert_close(call(fusion, pack), expected)


def test_containers_keep_their_type(call):
    Pair = namedtuple("Pair", "left right")

    def check(pair, mapping):
        assert type(pair) is Pair
        assert type(mapping) is OrderedDict
        assert list(mapping) == ["z", "a"]
        assert isinstance(mapping["z"], tuple)
        return pair.left + mapping["z"][0] + mapping["a"]

    x = samples(4)
    inputs = Pair(x, None), OrderedDict(z=(x, 3), a=x)
    branches = [Function(check), Function(check)]
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution="routed")
    assert_close(call(fusion, *inputs), 3 * x)


@pytest.mark.parametrize("execution", MODES)
def test_what_is_not_per_sample_passes(execution):
    """Shared tensors, also of N rows, 0-dim tensors, None, numbers, strings."""
    n = 4
    shared, scalar = samples(n), torch.tensor(2.0)
    seen = []

    def branch(x, table, scale, nothing, number, word, flag):
        seen.append(len(x))
        assert table.data_ptr() == shared.data_ptr()
        assert table.shape == shared.shape
        assert (nothing, number, word, flag) == (None, 3, "mean", True)
        return x * scale * table.sum()

    inputs = (x := samples(n), Shared(shared), scalar, None, 3, "mean", True)
    gate = Branch(choosing([0, 1, 1, 1], 2), inputs=[0])
    fusion = RoutedFusion(gate, [Function(branch), Function(branch)], execution=execution)
    with torch.no_grad():
        assert_close(fusion(*inputs), 2 * x * shared.sum())
    assert seen == ([4, 4] if execution == "masked" else [1, 3])


def test_shared_tensors_get_gradients():
    gate, branches = choosing([0, 1, 1, 0], 2), toy(num_branches=2)[1]

    class Scaled(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x, scale):
            return self.body(x) * scale

    branches = [Scaled(branch) for branch in branches]
    modules = [gate, *branches]
    inputs = (samples(4), samples(1, 3)[0])
    expected = backward(masked_fusion(gate, branches), modules, inputs)
    fusion = RoutedFusion(gate, branches, execution="routed")
    actual = backward(lambda x, scale: fusion(x, Shared(scale)), modules, inputs)
    assert_same(actual, expected)


def test_the_gate_gets_what_is_shared_unwrapped(call):
    table = samples(3)

    def gate(x, shared):
        assert shared is table
        return x[:, :2]

    branches = [Function(lambda x, shared: x)] * 2
    x = samples(4)
    fusion = RoutedFusion(Function(gate), branches, execution="routed")
    assert_close(call(fusion, x, Shared(table)), x)


@pytest.mark.parametrize("select", [1, "multi_hot"])
def test_what_a_callable_selects_keeps_its_graph(backend, select):
    """Also where a branch runs without one first, on the samples it was not chosen for."""
    x = torch.randn(6, FEATURES, dtype=torch.float64, requires_grad=True)
    gate, branches = toy(3)
    parts = [Branch(branch, inputs=lambda x: 2 * x) for branch in branches]
    fusion = RoutedFusion(gate, parts, select=select)
    grads = []
    for execution in ("routed", "masked"):
        fusion.execution = execution
        grads.append(torch.autograd.grad(fusion(x).square().sum(), x))
    torch.testing.assert_close(*grads)


def test_as_many_choices_as_samples(backend):
    """One sample takes both branches and one none: the rest of one is not what the other has."""
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    logits = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]).double()
    gate, branches = FixedGate(logits), [mlp(3) for _ in range(2)]
    fusion = RoutedFusion(gate, branches, select="multi_hot")
    modules = [gate, *branches]
    routed = backward(fusion, modules, [x])
    fusion.execution = "masked"
    assert_same(routed, backward(fusion, modules, [x]))


@pytest.mark.parametrize("count", [2, 3])
def test_a_training_step_gathers_every_row_once(count, monkeypatch):
    """With two branches, whose samples are each other's rest; the backward pass gathers its own."""
    moved = []
    kernels = ops.kernels()

    class Counting:
        def __getattr__(self, name):
            def call(*arguments, **named):
                result = getattr(kernels, name)(*arguments, **named)
                if name == "gather_rows":
                    moved.append(sum(len(rows) for rows in result))
                return result

            return call

    monkeypatch.setattr(ops, "kernels", Counting)
    _, branches = toy(count)
    gate = choosing([n % count for n in range(32)], count)
    x = torch.randn(32, FEATURES, dtype=torch.float64)
    output, routing = RoutedFusion(gate, branches)(x, return_routing=True)
    assert sum(moved) == (32 if count == 2 else 32 * count)
    output.sum().backward()
    assert routing.rows_run == (32,) * count


def test_what_a_branch_writes_into_the_rows_of_others(backend):
    """A write that no attribute tells of: the samples are gathered again."""
    x = torch.randn(6, FEATURES, dtype=torch.float64)
    gate, branches = toy(2)
    writing = Function(lambda rows: rows.mul_(2) @ torch.ones(FEATURES, 3).double())
    plain = Function(lambda rows: (rows * 2) @ torch.ones(FEATURES, 3).double())
    choice = torch.tensor([0, 1, 1, 0, 1, 0])
    gate = choosing(choice.tolist(), 2)
    results = [
        backward(RoutedFusion(gate, [branches[0], second]), [gate, branches[0]], [x.clone()])
        for second in (writing, plain)
    ]
    assert_same(*results)


@pytest.mark.parametrize("mode", MODES)
def test_who_takes_the_only_branch_may_be_bools_of_the_samples(mode):
    gate, branches = toy(1)
    x = torch.randn(6, FEATURES, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, False])
    fusion = RoutedFusion(gate, branches, execution=mode)
    output, routing = fusion(x, choice=mask, return_routing=True)
    assert_close(output, branches[0](x) * mask.unsqueeze(1))
    assert routing.counts == (3,)
