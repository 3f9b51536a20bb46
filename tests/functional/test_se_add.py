"""se_add and the fusion modules: against the formula in plain PyTorch, fp64 and below."""

import copy

import pytest
import torch
from models import Function, Planned, assert_close, assert_same, backward, relative_error
from stacks import CHANNELS, Pool, batch, masked_nested, modules_of, parts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dynmm_kernels
from dynmm_kernels import NestedFusion
from dynmm_kernels.functional import se_add
from dynmm_kernels.nn import Add, Concat, SEAdd, WeightedSum

SHAPES = [
    (5, 3, 4, 6),
    (3, 70, 3, 5),
    (4, 8),
    (2, 5, 9),
    (2, 3, 2, 3, 4),
    (1, 1, 1, 1),
    (2, 16, 40, 41),
]
COUNTS = ["none", "one", "all but one", "all"]
LOW = [torch.float32, torch.float16, torch.bfloat16]

for_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
for_counts = pytest.mark.parametrize("count", COUNTS)


def eager(main: Tensor, aux: Tensor, fusion: SEAdd) -> Tensor:
    """As ESANet and DynMM write it, on the samples that aux has."""

    def excited(maps: Tensor, excite: nn.Module) -> Tensor:
        squeezed = maps.flatten(2).mean(2) if maps.ndim > 2 else maps
        return maps * excite(squeezed).view(*squeezed.shape, *[1] * (maps.ndim - 2))

    head = excited(main[: len(aux)], fusion.excite_main) + excited(aux, fusion.excite_aux)
    return torch.cat([head, main[len(aux) :]])


def number(count: str, rows: int) -> int:
    return {"none": 0, "one": 1, "all but one": rows - 1, "all": rows}[count]


def last(maps: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return maps.to(memory_format=formats.get(maps.ndim, torch.contiguous_format))


LAYOUTS = {
    "contiguous": lambda maps: maps,
    "channels last": last,
    "transposed": lambda maps: maps.transpose(1, -1).contiguous().transpose(1, -1),
    "every other sample": lambda maps: maps.repeat_interleave(2, 0)[::2],
    "expanded": lambda maps: maps[:1].expand(maps.shape),
}


def problem(
    shape: tuple[int, ...], count: int, dtype=torch.float64
) -> tuple[Tensor, Tensor, SEAdd]:
    fusion = SEAdd(shape[1], reduction=2).to(dtype)
    main = torch.randn(shape, dtype=torch.float64).to(dtype)
    return main, torch.randn(count, *shape[1:], dtype=torch.float64).to(dtype), fusion


@for_shapes
@for_counts
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(layout, shape, count, backend):
    main, aux, fusion = problem(shape, number(count, shape[0]))
    main, aux = LAYOUTS[layout](main), LAYOUTS[layout](aux)
    expected = backward(lambda m, a: eager(m, a, fusion), [fusion], (main, aux))
    assert_same(backward(fusion, [fusion], (main, aux)), expected)
    with torch.no_grad():
        assert_close(fusion(main, aux), eager(main, aux, fusion))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_memory_format_stays(layout, backend):
    main, aux, fusion = problem((3, 4, 5, 6), 2)
    main = LAYOUTS[layout](main).requires_grad_()
    out = fusion(main, aux)
    assert out.stride() == main.stride()
    (grad,) = torch.autograd.grad(out.sum(), main)
    assert grad.stride() == main.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_gradcheck(layout, backend):
    main, aux, fusion = problem((3, 4, 2, 3), 2)
    leaves = [LAYOUTS[layout](x).requires_grad_() for x in (main, aux)]
    assert torch.autograd.gradcheck(lambda m, a, *_: fusion(m, a), (*leaves, *fusion.parameters()))


@pytest.mark.parametrize("power", [1, 2])
def test_second_derivative(power, backend):
    """Also where the gradient that comes in is constant."""
    main, aux, fusion = problem((2, 4, 2, 2), 1)
    main.requires_grad_()

    def second(fuse):
        (grad,) = torch.autograd.grad(fuse(main, aux).pow(power).sum(), main, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [main, *fusion.parameters()])

    assert_close(second(fusion), second(lambda m, a: eager(m, a, fusion)))


def test_second_derivative_where_the_streams_come_from_each_other(backend):
    """And from the parameters: one module in two places."""
    main, _, fusion = problem((2, 4, 2, 2), 2)
    main.requires_grad_()

    def second(fuse):
        once = fuse(main, main.tanh())
        out = fuse(once, once.sin())
        (grad,) = torch.autograd.grad(out.square().sum(), main, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [main, *fusion.parameters()])

    assert_close(second(fusion), second(lambda m, a: eager(m, a, fusion)), 1e-10)


def test_checkpointed_once(backend):
    """Checkpointing runs the block again once, however many SEAdds it has."""
    main, aux, fusion = problem((3, 4, 2, 2), 2)
    calls = []

    def block(m):
        calls.append(1)
        for _ in range(3):
            m = fusion(m, aux)
        return m

    out = checkpoint(block, main.requires_grad_(), use_reentrant=False)
    (grad,) = torch.autograd.grad(out.square().sum(), main)
    assert len(calls) == 2
    assert_close(grad, torch.autograd.grad(block(main).square().sum(), main)[0])


@pytest.mark.parametrize("blind", ["excite_main", "excite_aux", "both"])
def test_an_excitation_without_a_graph(blind, backend):
    main, aux, fusion = problem((3, 4, 2, 2), 2)
    for name in ("excite_main", "excite_aux"):
        if blind in (name, "both"):
            setattr(fusion, name, Function(torch.ones_like))
    inputs = (main, aux)
    expected = backward(lambda m, a: eager(m, a, fusion), [fusion], inputs)
    assert_same(backward(fusion, [fusion], inputs), expected)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(4, 32, 30, 40), (8, 64)], ids=str)
def test_low_precision(shape, dtype, backend):
    """At most 2x (forward) and 3x (gradients) the error of plain PyTorch in that precision."""
    main, aux, fusion = problem(shape, 3, dtype)
    exact = copy.deepcopy(fusion).double()
    wide = (main.double(), aux.double())
    expected = backward(lambda m, a: eager(m, a, exact), [exact], wide)
    plain = backward(lambda m, a: eager(m, a, fusion), [fusion], (main, aux))
    ours = backward(fusion, [fusion], (main, aux))
    results = [[run.output, *run.all()] for run in (ours, plain, expected)]
    for i, (a, b, e) in enumerate(zip(*results, strict=True)):
        allowed = max(relative_error(b.double(), e), torch.finfo(dtype).eps)
        assert relative_error(a.double(), e) <= (2 if i == 0 else 3) * allowed, i


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_same_bits_again_and_with_other_threads(layout, backend, deterministic, restored_threads):
    main, aux, fusion = problem((6, 70, 31, 33), 4, torch.float32)
    main, aux = LAYOUTS[layout](main), LAYOUTS[layout](aux)
    runs = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        run = backward(fusion, [fusion], (main, aux))
        runs.append([run.output, *run.all()])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    if backend == "cpu":  # the maps are ours; the excitation's matrix products are torch's
        with dynmm_kernels.backend("cpu"):
            kernels = dynmm_kernels.ops.kernels()
            outcomes = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                outcomes.append((kernels.se_add_means(main), *kernels.se_add_dots(main, main, aux)))
        assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_an_excitation_that_ignores_its_input(backend):
    main, aux, _ = problem((3, 4, 2, 2), 2)
    scale = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def excite(means: Tensor) -> Tensor:
        return scale.expand_as(means)

    out = se_add(main.requires_grad_(), aux, excite, excite, [scale])
    expected = torch.cat([(main[:2] + aux) * scale.view(4, 1, 1), main[2:]])
    cotangent = torch.randn_like(out)
    ours = torch.autograd.grad(out, [main, scale], cotangent)
    theirs = torch.autograd.grad(expected, [main, scale], cotangent)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_frozen_parts_get_no_gradient(backend):
    main, aux, fusion = problem((3, 4, 2, 2), 2)
    fusion.excite_aux.requires_grad_(False)
    fusion(main, aux).sum().backward()
    assert all(p.grad is None for p in fusion.excite_aux.parameters())
    assert all(p.grad is not None for p in fusion.excite_main.parameters())
    assert not fusion.requires_grad_(False)(main, aux).requires_grad


def test_backward_twice(backend):
    main, aux, fusion = problem((3, 4, 2, 2), 2)
    out = fusion(main.requires_grad_(), aux).sum()
    first = torch.autograd.grad(out, main, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, main)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, backend):
    main, aux, fusion = problem((3, 4, 5, 6), 2, torch.float32)
    aux = aux.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fusion(main.requires_grad_(), aux)
        out.sum().backward()
    assert out.dtype is torch.float32
    assert relative_error(out.detach(), eager(main, aux.float(), fusion).detach()) < 1e-2
    assert all(p.grad is not None for p in fusion.parameters())


def test_second_derivative_of_what_autocast_computed(backend):
    """The excitations, computed anew outside of the block, are those of the forward pass."""
    main, aux, fusion = problem((3, 16, 5, 6), 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fusion(main.requires_grad_(), aux)
    (first,) = torch.autograd.grad(out.square().sum(), main, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), main)
    assert second.isfinite().all()


@pytest.mark.parametrize(
    ("main", "aux", "error", "message"),
    [
        ("maps", torch.zeros(1, 2), TypeError, "main must be a floating tensor.*got str"),
        (torch.zeros(1, 2), torch.zeros(1, 2).long(), TypeError, "aux.*got torch.int64"),
        (torch.zeros(1, 2), torch.zeros(2, 2), ValueError, r"n <= N; got \[1, 2\] and \[2, 2\]"),
        (torch.zeros(2, 2), torch.zeros(1, 3), ValueError, r"\[2, 2\] and \[1, 3\]"),
        (torch.zeros(2), torch.zeros(1), ValueError, r"\[N, C, ...\]"),
        (torch.zeros(1, 2), torch.zeros(1, 2).half(), TypeError, "one dtype"),
    ],
)
def test_bad_input(main, aux, error, message):
    with pytest.raises(error, match=message):
        SEAdd(2)(main, aux)


def test_an_excitation_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"shape of the channel means, \[1, 2\]; got \[1, 1\]"):
        se_add(torch.zeros(1, 2), torch.zeros(1, 2), lambda x: x[:, :1], lambda x: x)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 1, 3, 5), (5, 33, 4, 7)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_opcheck(dtype, layout, shape, backend):
    main = LAYOUTS[layout](torch.randn(shape).to(dtype))
    aux = torch.randn(shape).to(dtype)[: shape[0] - 1 if shape[0] > 1 else shape[0]]
    wide = dynmm_kernels.ops.weight_dtype(dtype)
    factors = [torch.randn(len(aux), shape[1]).to(wide) for _ in range(4)]
    calls = {
        "se_add": (main, aux, *factors[:2]),
        "se_add_means": (main,),
        "se_add_dots": (main, main, aux),
        "se_add_grads": (main, *factors),
    }
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    checks += ("test_aot_dispatch_dynamic",)
    for op, arguments in calls.items():
        overload = getattr(torch.ops.dynmm_kernels, op).default
        results = torch.library.opcheck(overload, arguments, test_utils=checks)
        assert results == dict.fromkeys(checks, "SUCCESS")


FUSIONS = {
    "se_add": lambda: SEAdd(CHANNELS, reduction=2),
    "add": Add,
    "concat": lambda: Concat(CHANNELS),
    "weighted sum": WeightedSum,
}


@pytest.mark.parametrize("mode", ["straight_through", "selected", "none"])
@pytest.mark.parametrize("kind", ["mlp", "nchw", "channels_last"])
@pytest.mark.parametrize("name", FUSIONS)
def test_fusions_in_a_stack(name, kind, mode, backend):
    depths = [0, 4, 2, 2, 0, 1, 4, 0, 3]
    gate = Planned(Pool(2 * CHANNELS, 5), torch.tensor(depths), 5)
    main, aux, _ = parts(kind, 4)
    pieces = main, aux, [FUSIONS[name]().double() for _ in range(4)]
    nested = NestedFusion(gate, *pieces, execution="routed", gate_grad=mode)
    inputs = batch(kind, len(depths))
    expected = backward(masked_nested(gate, *pieces, mode=mode), modules_of(gate, *pieces), inputs)
    actual = backward(nested, [nested], inputs)
    by_parameter = dict(zip(nested.parameters(), actual.parameters, strict=True))
    order = [p for module in modules_of(gate, *pieces) for p in module.parameters()]
    actual.parameters = [by_parameter[p] for p in order]
    assert_same(actual, expected)
    with torch.no_grad():
        assert_close(nested(*inputs), expected.output)


def test_a_fusion_that_fuses_prefixes_gets_the_whole_main_stream():
    seen = []

    class Spy(SEAdd):
        def forward(self, main, aux):
            seen.append((len(main), len(aux)))
            return super().forward(main, aux)

    stages = [Function(lambda x: x + 1) for _ in range(4)]
    depth = torch.tensor([0, 2, 1, 2])
    nested = NestedFusion(nn.Identity(), stages[:2], stages[2:], [Spy(3), Spy(3)])
    nested(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), depth=depth)
    assert seen == [(4, 3), (4, 2)]


def test_the_number_of_channels_is_checked():
    with pytest.raises(ValueError, match=r"SEAdd: wanted \[N, 8, ...\]; got \[3, 6, 4, 4\]"):
        SEAdd(8)(torch.zeros(3, 6, 4, 4), torch.zeros(3, 6, 4, 4))


def test_concat_is_a_linear_map_and_keeps_channels_last():
    main, aux = torch.randn(3, 4, 5, 6), torch.randn(3, 2, 5, 6)
    concat = Concat(4, 2)
    flat = nn.functional.linear(
        torch.cat([main, aux], 1).movedim(1, -1),
        concat.project.weight[:, :, 0],
        concat.project.bias,
    ).movedim(-1, 1)
    torch.testing.assert_close(concat(main, aux), flat)
    last = concat(*(x.to(memory_format=torch.channels_last) for x in (main, aux)))
    torch.testing.assert_close(last, flat)
    assert last.is_contiguous(memory_format=torch.channels_last)
    for pick in ((..., 0), (..., 0, 0)):
        torch.testing.assert_close(concat(main[pick], aux[pick]), flat[pick])
