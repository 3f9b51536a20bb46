"""Mistakes: an error of the right type, saying what came and what was wanted, and no harm done."""

import dataclasses
from collections import UserDict

import numpy
import pytest
import torch
from models import FEATURES, MODES, FixedGate, Function, choosing, masked_fusion, mlp, toy
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from dynmm_kernels import Branch, Lazy, RoutedFusion, branch_costs, resource_loss

N = 4
ALL_MODES = ["dense", *MODES]
BAD_NUMBERS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def samples(n: int = N) -> Tensor:
    return torch.randn(n, FEATURES, dtype=torch.float64)


def fusion_with(second_branch, execution: str = "routed", **options) -> RoutedFusion:
    """Branch "plain" returns x; branch "odd" is the given function; both have rows."""
    branches = {"plain": Function(lambda *x: x[0]), "odd": Function(second_branch)}
    return RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution=execution, **options)


# Gate


@pytest.mark.parametrize("execution", ALL_MODES)
@pytest.mark.parametrize("shape", [(N, 3), (N, 1), (N,), (N, 2, 1), (N + 1, 2), (N - 1, 2), ()])
def test_gate_of_the_wrong_shape(execution, shape, call):
    gate = Function(lambda x: torch.zeros(shape, dtype=x.dtype))
    fusion = RoutedFusion(gate, toy(2)[1], execution=execution)
    got = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"gate.*\[4, 2\].*\[{got}\]"):
        call(fusion, samples())


@pytest.mark.parametrize("execution", ALL_MODES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_gate_of_the_wrong_dtype(execution, dtype, call):
    fusion = RoutedFusion(Function(lambda x: torch.zeros(N, 2, dtype=dtype)), toy(2)[1])
    fusion.execution = execution
    with pytest.raises(TypeError, match=rf"gate.*floating.*{dtype}"):
        call(fusion, samples())


@pytest.mark.parametrize("result", [None, 3, (torch.zeros(N, 2),)])
def test_gate_returns_no_tensor(result, call):
    fusion = RoutedFusion(Function(lambda x: result), toy(2)[1])
    with pytest.raises(TypeError, match=rf"gate.*{type(result).__name__}"):
        call(fusion, samples())


@pytest.mark.parametrize("execution", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_nan_logit_names_its_row(execution, dtype, call):
    logits = torch.zeros(N, 2, dtype=dtype)
    logits[2, 1] = float("nan")
    fusion = RoutedFusion(FixedGate(logits), toy(2)[1], execution=execution)
    with pytest.raises(ValueError, match=r"nan.*row 2"):
        call(fusion, samples())


@pytest.mark.parametrize("execution", MODES)
@pytest.mark.parametrize("row", ["inf", "-inf"])
def test_rows_without_a_softmax(execution, row, call):
    """An infinite maximum, or -inf everywhere: the softmax is nan."""
    logits = torch.zeros(N, 2)
    logits[1] = BAD_NUMBERS[row]
    fusion = RoutedFusion(FixedGate(logits), toy(2)[1], execution=execution)
    with pytest.raises(ValueError, match=r"finite.*row 1"):
        call(fusion, samples())


@pytest.mark.parametrize("execution", MODES)
def test_a_branch_ruled_out_by_minus_inf_is_no_mistake(execution):
    logits = torch.tensor([[float("-inf"), 0.0]] * N, dtype=torch.float64)
    gate, branches = FixedGate(logits), toy(2)[1]
    x = samples()
    output = RoutedFusion(gate, branches, execution=execution)(x)
    assert torch.allclose(output, branches[1](x), rtol=1e-12)
    output.sum().backward()
    assert gate.logits.grad.isfinite().all()


@pytest.mark.parametrize("execution", MODES)
def test_usable_after_bad_logits(execution, call):
    gate = choosing([0, 1, 1, 0], 2)
    fusion = RoutedFusion(gate, toy(2)[1], execution=execution)
    x = samples()
    before = call(fusion, x)
    with torch.no_grad():
        saved = gate.logits.clone()
        gate.logits[3] = float("nan")
    with pytest.raises(ValueError, match="row 3"):
        call(fusion, x)
    with torch.no_grad():
        gate.logits.copy_(saved)
    assert torch.equal(call(fusion, x), before)


# Choice


@pytest.mark.parametrize("execution", MODES)
@pytest.mark.parametrize("value", [2, -2, 2**31, 2**32, -(2**40)])
def test_choice_out_of_range(execution, value, call):
    """Also where the value would fit after its upper half is cut off."""
    fusion = RoutedFusion(*toy(2), execution=execution)
    choice = torch.tensor([0, 1, value, 0])
    with pytest.raises(ValueError, match=rf"(?s)0\.\.1.*{value}.*row 2|row 2.*{value}"):
        call(fusion, samples(), choice=choice)


@pytest.mark.parametrize("execution", MODES)
@pytest.mark.parametrize("value", [2, -2, 2**40])
def test_choice_int_out_of_range(execution, value, call):
    fusion = RoutedFusion(*toy(2), execution=execution)
    with pytest.raises(ValueError, match=rf"choice.*0\.\.1.*{value}"):
        call(fusion, samples(), choice=value)


@pytest.mark.parametrize("execution", MODES)
@pytest.mark.parametrize(
    "choice",
    [torch.zeros(N), torch.zeros(N, dtype=torch.bool), [0, 1, 1, 0], 1.0, "first", numpy.zeros(N)],
    ids=["float", "bool", "list", "number", "str", "numpy"],
)
def test_choice_of_the_wrong_type(execution, choice, call):
    fusion = RoutedFusion(*toy(2), execution=execution)
    with pytest.raises(TypeError, match="choice must be an int or a LongTensor"):
        call(fusion, samples(), choice=choice)


@pytest.mark.parametrize("execution", MODES)
@pytest.mark.parametrize("shape", [(N, 1), (N, 2), (N + 1,), (N - 1,), (0,), ()])
def test_choice_of_the_wrong_shape(execution, shape, call):
    fusion = RoutedFusion(*toy(2), execution=execution)
    got = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"choice.*\[4\].*\[{got}\]"):
        call(fusion, samples(), choice=torch.zeros(shape, dtype=torch.int64))


# Branches


STRUCTURE = "returns another structure than branch 'plain'"
# name -> what branch "odd" returns of [2, 6] (of [4, 6] where all run), and what the error says
ODD_OUTPUTS = {
    "another structure": (lambda x: (x, x), STRUCTURE),
    "a dict": (lambda x: {"scores": x}, STRUCTURE),
    "None": (lambda x: None, STRUCTURE),
    "a number": (lambda x: 3.0, STRUCTURE),
    "another dtype": (
        lambda x: x.long(),
        r"torch\.int64, that of branch 'plain' is torch\.float64",
    ),
    "another precision": (
        lambda x: x.float(),
        r"torch\.float32, that of branch 'plain' is torch\.float64",
    ),
    "fewer rows": (lambda x: x[:-1], r"output 0 must have [24] rows.* got shape \[[13], 6\]"),
    "more rows": (lambda x: x.repeat(2, 1), r"must have [24] rows.* got shape \[[48], 6\]"),
    "another width": (lambda x: x[:, :-1], r"rows of shape \[5\], those of branch 'plain'"),
    "another rank": (lambda x: x[:, :, None], r"rows of shape \[6, 1\], those of branch 'plain'"),
    "a vector": (lambda x: x[:, 0], r"rows of shape \[\], those of branch 'plain'"),
    "a 0-dim tensor": (lambda x: x.sum(), r"must be a tensor of shape \[[24], .*got .*tensor\[\]"),
}


@pytest.mark.parametrize("gate_grad", ["straight_through", "selected", "none"])
@pytest.mark.parametrize("execution", ALL_MODES)
@pytest.mark.parametrize(("odd", "message"), ODD_OUTPUTS.values(), ids=ODD_OUTPUTS)
def test_branch_outputs_that_do_not_fit(odd, message, execution, gate_grad, call):
    fusion = fusion_with(odd, execution, gate_grad=gate_grad)
    with pytest.raises((ValueError, TypeError), match=f"^branch 'odd'.*{message}"):
        call(fusion, samples())


@pytest.mark.parametrize("odd", [lambda x: x[:-1], lambda x: x.sum()])
@pytest.mark.parametrize("execution", MODES)
def test_an_output_that_does_not_fit_where_all_samples_go_one_way(odd, execution, call):
    branches = {"plain": nn.Identity(), "odd": Function(odd)}
    fusion = RoutedFusion(choosing([1] * N, 2), branches, execution=execution)
    with pytest.raises(ValueError, match=r"^branch 'odd': output 0 must .* per sample"):
        call(fusion, samples())


def test_dict_outputs_with_other_keys(call):
    branches = {"one": Function(lambda x: {"a": x}), "two": Function(lambda x: {"b": x})}
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution="routed")
    with pytest.raises(
        ValueError, match=r"^branch 'two' returns another structure than branch 'one'"
    ):
        call(fusion, samples())


@pytest.mark.parametrize("execution", ALL_MODES)
def test_an_exception_in_a_branch(execution, call):
    """Keeps its type, names the branch; the module goes on working afterwards."""

    class Refused(RuntimeError):
        pass

    faulty = True

    def odd(x):
        if faulty:
            raise Refused("no such file")
        return x

    fusion = fusion_with(odd, execution)
    x = samples()
    with pytest.raises(Refused, match="no such file") as caught:
        call(fusion, x)
    notes = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert any("odd" in note for note in notes)
    faulty = False
    assert torch.allclose(call(fusion, x), x, rtol=1e-12)


def test_an_exception_in_the_complement():
    """Raised while the other rows are run without a graph: grad mode is left as it was."""

    def odd(x):
        if not torch.is_grad_enabled():
            raise KeyError("missing")
        return x

    fusion = fusion_with(odd)
    with pytest.raises(KeyError, match="missing"):
        fusion(samples())
    assert torch.is_grad_enabled()


# Inputs


@pytest.mark.parametrize("execution", ALL_MODES)
def test_sample_counts_that_differ(execution, call):
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), [nn.Bilinear(6, 6, 3)] * 2)
    fusion.execution = execution
    with pytest.raises(ValueError, match=r"tensor 1 has shape \[5, 6\], expected 4 samples"):
        call(fusion, samples(), samples(5))


def test_a_tensor_of_one_number_is_a_sample(call):
    """Unlike one of no dimensions, which belongs to the whole batch."""
    branches = [Function(lambda x, scale: x * scale)] * 2
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution="routed")
    with pytest.raises(ValueError, match=r"tensor 1 has shape \[1\], expected 4 samples"):
        call(fusion, samples(), torch.ones(1))


@pytest.mark.parametrize("execution", ALL_MODES)
def test_devices_that_differ(execution, call):
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), [nn.Bilinear(6, 6, 3)] * 2)
    fusion.execution = execution
    with pytest.raises(ValueError, match=r"one device; tensor 1 is on meta, the first on cpu"):
        call(fusion, samples(), samples().to("meta"))


@pytest.mark.parametrize("execution", ALL_MODES)
def test_unknown_modality(execution, call):
    branches = [Branch(mlp(), inputs=["txt"], name="far"), Branch(mlp(), inputs=["text"])]
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution=execution)
    with pytest.raises(ValueError, match=r"far.*'txt'.*'text'"):
        call(fusion, {"text": samples()})


@pytest.mark.parametrize("position", [2, -3])
@pytest.mark.parametrize("execution", ALL_MODES)
def test_unknown_position(execution, position, call):
    branches = [Branch(mlp(), inputs=[position], name="far"), Branch(mlp(), inputs=[0])]
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution=execution)
    with pytest.raises(ValueError, match=rf"far.*{position}.*2 inputs"):
        call(fusion, samples(), samples())


def test_names_without_a_dict(call):
    branches = [Branch(mlp(), inputs=["text"], name="b"), mlp()]
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches)
    with pytest.raises(ValueError, match=r"b.*'text'.*dict"):
        call(fusion, samples())


@dataclasses.dataclass
class Batch:
    x: Tensor


CONTAINERS = {
    "numpy": (lambda: numpy.zeros((N, FEATURES)), "numpy.*from_numpy"),
    "packed": (lambda: pack_sequence([torch.zeros(2, 3)] * N), "PackedSequence.*padded"),
    "dataclass": (lambda: Batch(samples()), "Batch.*(dict|tuple)"),
    "UserDict": (lambda: UserDict(x=samples()), "UserDict.*(dict|tuple)"),
    "sparse": (lambda: samples().to_sparse(), "strided"),
}


@pytest.mark.parametrize("execution", ALL_MODES)
@pytest.mark.parametrize(("make", "message"), CONTAINERS.values(), ids=CONTAINERS)
def test_containers_that_cannot_be_split(execution, make, message, call):
    """At any depth: passing them whole to a subset of rows would be silently wrong."""
    branches = [Function(lambda x, other: x)] * 2
    fusion = RoutedFusion(choosing([0, 1, 1, 0], 2), branches, execution=execution)
    for other in (make(), [make()], {"deep": (make(),)}):
        with pytest.raises(TypeError, match=message):
            call(fusion, samples(), other)


LAZY_RESULTS = {
    "too few rows": lambda rows: torch.zeros(max(len(rows) - 1, 0), FEATURES).double(),
    "all rows": lambda rows: torch.zeros(N, FEATURES).double(),
    "a scalar": lambda rows: torch.tensor(1.0),
    "None": lambda rows: None,
    "a list": lambda rows: [torch.zeros(FEATURES)] * len(rows),
}


@pytest.mark.parametrize("fetch", LAZY_RESULTS.values(), ids=LAZY_RESULTS)
def test_lazy_returns_the_wrong_rows(fetch, call):
    branches = {"now": Branch(mlp(), inputs=[0]), "late": Branch(mlp(), inputs=[1])}
    gate = Branch(choosing([0, 1, 1, 0], 2), inputs=[0])
    fusion = RoutedFusion(gate, branches, execution="routed", gate_grad="none")
    with pytest.raises(ValueError, match="branch 'late': Lazy was asked for 2 rows"):
        call(fusion, samples(), Lazy(fetch))


@pytest.mark.parametrize("execution", ALL_MODES)
def test_lazy_alone_leaves_the_number_of_samples_unknown(execution, call):
    """A gate that reads it would be asked about no rows at all."""
    fusion = RoutedFusion(*toy(2), execution=execution)
    with pytest.raises(ValueError, match="with Lazy inputs alone the number of samples is unknown"):
        call(fusion, Lazy(lambda rows: samples()[rows]))


def test_lazy_alone_with_one_choice_for_all(call):
    fusion = RoutedFusion(*toy(2), execution="routed")
    with pytest.raises(ValueError, match="LongTensor"):
        call(fusion, Lazy(lambda rows: samples()[rows]), choice=0)


# Construction and settings


@pytest.mark.parametrize("branches", [[], {}, ()])
def test_no_branches(branches):
    with pytest.raises(ValueError, match="branches is empty"):
        RoutedFusion(mlp(2), branches)


def test_branches_that_cannot_be_called():
    with pytest.raises(TypeError, match="branch '1' must be a module or a function; got str"):
        RoutedFusion(mlp(2), [mlp(), "x"])
    with pytest.raises(TypeError, match="Branch: module must be a module or a function; got int"):
        Branch(3)
    with pytest.raises(TypeError, match="the gate must be a module or a function; got str"):
        RoutedFusion("gate", [mlp(), mlp()])


def test_names_that_repeat():
    with pytest.raises(ValueError, match=r"names.*twin"):
        RoutedFusion(mlp(2), [Branch(mlp(), name="twin"), Branch(mlp(), name="twin")])


BAD_SETTINGS = [
    ("execution", "fast", "masked.*fast"),
    ("execution", None, "masked.*None"),
    ("gate_grad", "exact", "straight_through.*exact"),
    ("gate_grad", None, "straight_through.*None"),
    ("noise", "gauss", "gumbel.*gauss"),
    ("noise", True, "gumbel.*True"),
    ("batch_norm", "eval", "subset.*eval"),
    ("temperature", 0, "temperature.*positive.*0"),
    ("temperature", -1.0, "temperature.*positive.*-1"),
    ("temperature", float("nan"), "temperature.*positive.*nan"),
    ("temperature", "warm", "temperature.*warm"),
    ("temperature", None, "temperature.*None"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_SETTINGS)
def test_bad_settings(name, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RoutedFusion(*toy(2), **{name: value})
    fusion = RoutedFusion(*toy(2))
    before = getattr(fusion, name)
    with pytest.raises((ValueError, TypeError), match=message):
        setattr(fusion, name, value)
    assert getattr(fusion, name) == before


def test_costs_that_do_not_fit():
    routing = RoutedFusion(*toy(2))(samples(), return_routing=True)[1]
    with pytest.raises(ValueError, match="cost"):
        resource_loss(routing)
    for costs in ([1.0], [1.0, 2.0, 3.0], []):
        with pytest.raises(ValueError, match=rf"2.*{len(costs)}"):
            resource_loss(routing, costs=costs)


def test_branch_costs_refuses():
    with pytest.raises(ValueError, match=r"macs.*ms.*flops"):
        branch_costs(mlp(), samples(), unit="flops")
    with pytest.raises(ValueError, match="at least one sample"):
        branch_costs(mlp(), samples(0))


# No samples


@pytest.mark.parametrize("gate_grad", ["straight_through", "selected", "none"])
@pytest.mark.parametrize("execution", ["routed", "auto"])
def test_an_empty_batch_behaves_as_masked(execution, gate_grad):
    gate, branches = toy()
    results = []
    for mode in ("masked", execution):
        fusion = RoutedFusion(gate, branches, execution=mode, gate_grad=gate_grad)
        x = samples(0).requires_grad_()
        output, routing = fusion(x, return_routing=True)
        assert routing.counts == (0, 0, 0)
        output.sum().backward()
        results.append((output, x.grad, [p.grad for b in branches for p in b.parameters()]))
        fusion.zero_grad()
    (masked, _, masked_gradients), (routed, x_grad, gradients) = results
    assert routed.shape == masked.shape == masked_fusion(gate, branches)(samples(0)).shape
    assert routed.dtype is masked.dtype
    assert x_grad.shape == (0, FEATURES)
    for a, e in zip(gradients, masked_gradients, strict=True):
        assert (a is None) == (e is None)
        assert a is None or torch.equal(a, e)


@pytest.mark.parametrize("execution", MODES)
def test_an_empty_batch_with_a_forced_choice(execution, call):
    fusion = RoutedFusion(*toy(), execution=execution)
    assert call(fusion, samples(0), choice=1).shape == (0, 3)
    assert call(fusion, samples(0), choice=torch.zeros(0, dtype=torch.int64)).shape == (0, 3)


def test_fractions_of_an_empty_batch():
    routing = RoutedFusion(*toy(), execution="routed")(samples(0), return_routing=True)[1]
    assert all(fraction == fraction for fraction in routing.fractions)


@pytest.mark.parametrize("execution", MODES)
def test_frozen_modules_are_no_mistake(execution):
    fusion = RoutedFusion(*toy(), execution=execution).requires_grad_(False)
    output = fusion(samples())
    assert not output.requires_grad


def test_branches_that_differ_are_named_once(call):
    fusion = RoutedFusion(choosing([0, 1], 2), {"p": mlp(3), "q": mlp(2)})
    with pytest.raises(
        ValueError, match=r"^branch 'q': output 0 .* those of branch 'p' have \[3\]"
    ):
        call(fusion, samples(2))


def test_a_choice_on_another_device(call):
    fusion = RoutedFusion(*toy(2))
    with pytest.raises(ValueError, match="choice must be on meta, as the inputs are; got cpu"):
        call(fusion, samples(2).to("meta"), choice=torch.tensor([0, 1]))
