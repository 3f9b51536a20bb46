"""energy_fuse: against plain Python, against autograd, and what it refuses."""

import math

import oracle
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import dynmm_kernels
from dynmm_kernels import energy_fuse
from dynmm_kernels.functional import EnergyFused

WEIGHTS = ["energy", "softmax", "uniform", "given"]
TARGETS = ["none", "classes", "labels"]

for_weights = pytest.mark.parametrize("weights", WEIGHTS)
for_targets = pytest.mark.parametrize("targets", TARGETS)
for_presence = pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
for_modalities = pytest.mark.parametrize("modalities", [1, 2, 3, 8])


class Case:
    """A batch in fp64; row 0 has nothing where modalities are missing."""

    def __init__(self, weights: str, targets: str, partial: bool, modalities=2, rows=6, classes=5):
        self.logits = [
            2 * torch.randn(rows, classes, dtype=torch.float64) for _ in range(modalities)
        ]
        self.present = None
        if partial:
            self.present = torch.rand(rows, modalities) < 0.6
            self.present[:1] = False
        self.targets = {
            "none": None,
            "classes": torch.randint(0, classes, (rows,)),
            "labels": torch.rand(rows, classes, dtype=torch.float64),
        }[targets]
        self.weights = weights
        if weights == "given":
            self.weights = torch.randn(rows, modalities, dtype=torch.float64)

    def fuse(self, logits: list[Tensor] | None = None, **named) -> EnergyFused:
        arguments = {"weights": self.weights, "present": self.present, **named}
        return energy_fuse(logits or self.logits, self.targets, **arguments)

    def leaves(self) -> list[Tensor]:
        given = [self.weights] if isinstance(self.weights, Tensor) else []
        return [leaf.requires_grad_() for leaf in [*self.logits, *given]]

    def plain(self, detach: bool = False) -> list[Tensor]:
        """The formulas as QMF's code writes them, with zeros where a modality is absent."""
        there = torch.ones(len(self.logits[0]), len(self.logits), dtype=torch.bool)
        there = there if self.present is None else self.present
        confidence = [
            torch.where(there[:, m], 0.1 * row.logsumexp(1), 0.0)
            for m, row in enumerate(self.logits)
        ]
        stacked = torch.stack(confidence, 1)
        held = stacked.detach() if detach else stacked
        if isinstance(self.weights, Tensor):
            weights = self.weights
        elif self.weights == "energy":
            weights = held
        elif self.weights == "softmax":
            shares = held.exp() * there
            weights = shares / shares.sum(1, keepdim=True).clamp_min(1e-300)
        else:
            weights = there.double() / there.sum(1, keepdim=True).clamp_min(1)
        weights = weights * there
        fused = sum(weights[:, m : m + 1] * row for m, row in enumerate(self.logits))
        if self.targets is None:
            return [fused, stacked]
        each = [self.loss(row) for row in [*self.logits, fused]]
        losses = torch.stack([*(of * there[:, m] for m, of in enumerate(each[:-1])), each[-1]], 1)
        return [fused, stacked, losses]

    def loss(self, row: Tensor) -> Tensor:
        functional = torch.nn.functional
        if self.targets.is_floating_point():
            binary = functional.binary_cross_entropy_with_logits
            return binary(row, self.targets, reduction="none").mean(1)
        return functional.cross_entropy(row, self.targets, reduction="none")


def given(fused: EnergyFused) -> list[Tensor]:
    return [part for part in fused if part is not None]


@for_weights
@for_targets
@for_presence
@for_modalities
def test_against_plain_python(backend, weights, targets, partial, modalities):
    case = Case(weights, targets, partial, modalities)
    wanted = oracle.energy_fuse(
        [row.tolist() for row in case.logits],
        None if case.targets is None else case.targets.tolist(),
        None if case.present is None else case.present.tolist(),
        case.weights if isinstance(case.weights, str) else case.weights.tolist(),
    )
    got = case.fuse()
    assert (got.losses is None) == (targets == "none")
    for ours, theirs in zip(given(got), wanted, strict=False):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64))


@for_weights
@for_targets
@for_presence
@pytest.mark.parametrize("detach", [False, True])
def test_gradients(backend, weights, targets, partial, detach):
    case = Case(weights, targets, partial, modalities=3)
    leaves = case.leaves()
    got, wanted = given(case.fuse(detach_confidence=detach)), case.plain(detach)
    incoming = [torch.randn_like(part) for part in wanted]
    for only in [None, *range(len(wanted))]:
        kept = [i for i in range(len(wanted)) if only in (None, i)]
        grads = [
            torch.autograd.grad(
                [parts[i] for i in kept],
                leaves,
                [incoming[i] for i in kept],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for parts in (got, wanted)
        ]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@for_weights
@for_targets
@for_presence
def test_any_derivative(backend, weights, targets, partial):
    case = Case(weights, targets, partial, rows=2, classes=3)
    leaves = case.leaves()

    def fuse(*leaves: Tensor) -> list[Tensor]:
        named = {"weights": leaves[-1]} if weights == "given" else {}
        return given(case.fuse([*leaves[:2]], **named))

    assert gradcheck(fuse, leaves, check_forward_ad=True)
    assert gradgradcheck(fuse, leaves)


def test_a_tensor_that_comes_twice(backend):
    row = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def fuse(row: Tensor) -> Tensor:
        return energy_fuse([row, row]).fused

    assert gradcheck(fuse, row)
    assert gradgradcheck(fuse, row)


def test_only_some_logits_learn(backend):
    learning, fixed = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    fused = energy_fuse([fixed, learning], torch.tensor([0, 1, 2, 0]))
    assert not energy_fuse([fixed, fixed]).fused.requires_grad
    fused.losses.sum().backward()
    other = torch.autograd.grad(energy_fuse([learning, fixed]).fused.sum(), learning)
    assert learning.grad.isfinite().all()
    assert other[0].isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 60.0), (torch.float32, 1e4), (torch.bfloat16, 1e4)]
)
@for_weights
def test_large_logits_stay_finite(backend, dtype, size, weights):
    case = Case(weights, "classes", partial=False)
    case.logits = [(size * row.sign()).to(dtype) for row in case.logits]
    if weights == "given":
        case.weights = case.weights.float()
    leaves = case.leaves()
    got = case.fuse()
    for part in got:
        assert part.isfinite().all()
    sum(part.sum() for part in got).backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()


@for_weights
@for_targets
def test_what_is_absent_is_not_read(backend, weights, targets):
    """nan where it is absent changes nothing, forward and backward."""
    case = Case(weights, targets, partial=True, modalities=3)
    absent = [~case.present[:, m, None] for m in range(3)]
    results = []
    for value in (0, math.nan):
        pairs = zip(case.logits, absent, strict=True)
        logits = [row.masked_fill(gone, value).requires_grad_() for row, gone in pairs]
        parts = given(case.fuse(logits))
        results.append([*parts, *torch.autograd.grad(sum(part.sum() for part in parts), logits)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    for grad, gone in zip(results[1][-3:], absent, strict=True):
        assert not grad.masked_select(gone).any()


@pytest.mark.parametrize("targets", ["classes", "labels"])
@for_weights
def test_a_sample_without_any_modality(backend, weights, targets):
    case = Case(weights, targets, partial=True)
    fused, confidence, losses = case.fuse()
    assert not fused[0].any()
    assert not confidence[0].any()
    assert losses[0].tolist() == pytest.approx([0, 0, math.log(5 if targets == "classes" else 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@for_weights
@for_targets
@pytest.mark.parametrize("classes", [2, 10, 101, 1000])
def test_lower_precision(backend, dtype, weights, targets, classes):
    """Sums are taken in fp32: as near to fp64 as the rounding of results allows."""
    case = Case(weights, targets, partial=True, rows=9, classes=classes)
    exact = Case(weights, targets, partial=False)
    case.logits = [row.to(dtype) for row in case.logits]
    if weights == "given":
        case.weights = case.weights.float()
    exact.__dict__.update(case.__dict__, logits=[row.double() for row in case.logits])
    results = []
    for each in (case, exact):
        leaves = each.leaves()
        parts = given(each.fuse())
        loss = sum(part.double().square().sum() for part in parts)
        results.append([*parts, *torch.autograd.grad(loss, leaves)])
    parts = 2 if targets == "none" else 3
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        scale = max(1.0, theirs.abs().max().item())
        rounded = ours.dtype if i < parts else dtype  # what comes in from fused is
        atol = 16 * torch.finfo(rounded).eps * scale
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)


@for_targets
def test_an_empty_batch(backend, targets):
    case = Case("energy", targets, partial=True, rows=0)
    leaves = case.leaves()
    parts = given(case.fuse())
    assert parts[0].shape == (0, 5)
    assert [part.shape for part in parts[1:]] == [(0, 2), (0, 3)][: len(parts) - 1]
    sum(part.sum() for part in parts).backward()
    assert leaves[0].grad.shape == (0, 5)


def test_strided_logits(backend):
    """Rows with gaps, columns of a wider tensor, transposed and expanded ones."""
    wide = torch.randn(7, 12, dtype=torch.float64)
    views = [wide[:, :5], wide[:, 5:10], wide.t()[:7, 1:6], wide[:1, :5].expand(7, 5)]
    got, wanted = energy_fuse(views), energy_fuse([view.contiguous() for view in views])
    torch.testing.assert_close(given(got), given(wanted), rtol=0, atol=0)


def test_autograd_of_another_thread(backend):
    """The backward pass runs on the backend of its forward pass."""
    row = torch.randn(4, 3, requires_grad=True)
    fused = energy_fuse([row], torch.tensor([0, 1, 2, 0]))
    other = "reference" if backend != "reference" else dynmm_kernels.ops.BACKENDS[1]
    if dynmm_kernels.ops.why_not(other) is None:
        with dynmm_kernels.backend(other):
            fused.losses.sum().backward()
        assert row.grad.isfinite().all()


def test_func_grad(backend):
    row = torch.randn(4, 3, dtype=torch.float64)
    grad = torch.func.grad(lambda row: energy_fuse([row, row]).fused.square().sum())(row)
    leaf = row.clone().requires_grad_()
    energy_fuse([leaf, leaf]).fused.square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


X = torch.zeros(3, 4)
REFUSED = {
    "no logits": (lambda: energy_fuse([]), ValueError, "1 to 8 tensors"),
    "a tensor": (lambda: energy_fuse(X), ValueError, "got Tensor"),
    "too many": (lambda: energy_fuse([X] * 9), ValueError, "got 9"),
    "integers": (lambda: energy_fuse([X, X.long()]), TypeError, r"logits\[1\] must be floating"),
    "another dtype": (lambda: energy_fuse([X, X.double()]), TypeError, r"logits\[1\].*float32"),
    "another shape": (lambda: energy_fuse([X, X[:2]]), ValueError, r"logits\[1\].*\[3, 4\]"),
    "another device": (lambda: energy_fuse([X, X.to("meta")]), ValueError, r"logits\[1\].*cpu"),
    "one dimension": (lambda: energy_fuse([X[0]]), ValueError, r"\[N, C\]"),
    "no classes": (lambda: energy_fuse([X[:, :0]]), ValueError, r"\[N, C\]"),
    "weights": (lambda: energy_fuse([X], weights="best"), ValueError, "'softmax'.*got 'best'"),
    "weights' shape": (
        lambda: energy_fuse([X], weights=torch.ones(3)),
        ValueError,
        r"weights must be .*\[3, 1\]",
    ),
    "scale": (lambda: energy_fuse([X], scale=math.nan), ValueError, "scale must be a finite"),
    "targets' dtype": (
        lambda: energy_fuse([X], torch.zeros(3, dtype=torch.int32)),
        TypeError,
        "targets must be torch.int64",
    ),
    "targets' shape": (
        lambda: energy_fuse([X], torch.zeros(3, 1, dtype=torch.int64)),
        ValueError,
        r"targets must be .*\[3\]",
    ),
    "labels' shape": (
        lambda: energy_fuse([X], X[:, :3]),
        ValueError,
        r"targets must be .*\[3, 4\]",
    ),
    "labels that learn": (
        lambda: energy_fuse([X], X.clone().requires_grad_()),
        ValueError,
        "targets get no gradient",
    ),
    "no such class": (
        lambda: energy_fuse([X], torch.tensor([0, 4, 1])),
        ValueError,
        r"0\.\.3; got 4",
    ),
    "a negative class": (
        lambda: energy_fuse([X], torch.tensor([0, -100, 1])),
        ValueError,
        r"0\.\.3; got -100",
    ),
    "present's dtype": (
        lambda: energy_fuse([X], present=torch.ones(3, 1)),
        TypeError,
        "present must be torch.bool",
    ),
    "present's shape": (
        lambda: energy_fuse([X, X], present=torch.ones(3, 1).bool()),
        ValueError,
        r"present must be .*\[3, 2\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(backend, name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=f"energy_fuse: .*{message}"):
        call()
