"""CascadeFusion at its edges: empty batches, nan, settings, and input that is refused."""

import copy
import doctest
import pickle

import pytest
import torch
import torch.nn.functional as F
from cascades import (
    CLASSES,
    FUSES,
    INF,
    NAN,
    SPLITS,
    STAGES,
    N,
    Told,
    Weigh,
    cascade_of,
    networks,
    planned,
    samples,
    three_inputs,
    told,
)
from models import FEATURES, Function, assert_close, mlp
from torch import nn

from dynmm_kernels import Branch, CascadeFusion, Lazy, deep_supervision_loss
from dynmm_kernels.nn import CascadeRouting
from dynmm_kernels.nn.cascade import fusion

# Empty batches, nan, settings


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("score", ["probability", "margin", "entropy", "energy"])
@pytest.mark.parametrize("fuse", FUSES)
def test_an_empty_batch(execution, score, fuse, call):
    fuse = FUSES[fuse][0]()
    cascade = CascadeFusion(networks(), score=score, fuse=fuse, execution=execution)
    x = samples(0)
    for options in ({}, {"exit": 1}, {"exit": torch.zeros(0, dtype=torch.int64)}):
        output, routing = call(cascade, x, return_routing=True, **options)
        assert output.shape == (0, CLASSES)
        assert output.dtype is torch.float64
        assert routing.counts == routing.rows_run == (0, 0, 0)
        assert routing.fractions == (0, 0, 0)
    if output.requires_grad:
        targets = torch.zeros(0, dtype=torch.int64)
        (output.sum() + deep_supervision_loss(routing, targets)).backward()
        assert all(p.grad.eq(0).all() for p in cascade.parameters())


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("level", [0, 1])
def test_a_nan_score_names_its_row(execution, level):
    x = planned([2, 0, 1, 0])
    x[3, 1] = NAN if level == 0 else 0
    cascade = told(execution=execution)
    if level == 1:
        cascade.stages[1] = Function(lambda x: Told(1)(x).where(x[:, 1:2] != 0, NAN))
    where = f"stage {level}" if execution == "routed" else "the cascade"
    with (
        torch.no_grad(),
        pytest.raises(
            ValueError, match=rf"{where}'s score must not be nan; got .*nan.* in row 3 \(1 such"
        ),
    ):
        cascade(x)
    x[3, 1] = 1
    with torch.no_grad():
        assert cascade(x).isfinite().all()


def test_nan_of_the_last_stage_and_of_forced_exits_is_not_hidden():
    x = planned([2, 0, 0])
    x[1, 1] = NAN
    with torch.no_grad():
        output = told()(x, exit=torch.tensor([0, 2, 2]))
    assert output.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_infinite_thresholds(execution):
    cascade, x = told(execution=execution), planned(SPLITS["mixed"])
    with torch.no_grad():
        for threshold, counts in ((INF, (0, 0, 8)), (-INF, (8, 0, 0)), ([INF, -INF], (0, 8, 0))):
            cascade.threshold = threshold
            assert cascade(x, return_routing=True)[1].counts == counts


@pytest.mark.parametrize("execution", ["routed", "masked"])
@pytest.mark.parametrize("threshold", [1.0, 1, [1.0], (1,), torch.tensor([1.0])])
def test_a_score_at_the_threshold_leaves(threshold, execution):
    cascade = CascadeFusion(
        [nn.Identity()] * 2, score=lambda x: x[:, 0], threshold=threshold, fuse="last"
    ).eval()
    cascade.execution = execution
    with torch.no_grad():
        routing = cascade(torch.tensor([[1.0, 0], [0.999, 0]]), return_routing=True)[1]
    assert routing.choice.tolist() == [0, 1]
    assert cascade.thresholds == (1.0,)


def test_settings_may_change():
    cascade, x = cascade_of(networks()), three_inputs()
    weigh = Weigh()
    for fuse in ("mean", weigh, "last", weigh, nn.Module()):
        cascade.fuse = fuse
        assert ("fuse.module.weights" in cascade.state_dict()) == (fuse is weigh)
    cascade.fuse = "mean"
    cascade.score = mlp(1, CLASSES)
    assert any(name.startswith("score.") for name in cascade.state_dict())
    cascade.score = "margin"
    assert not any(name.startswith("score.") for name in cascade.state_dict())
    for copied in (copy.deepcopy(cascade), pickle.loads(pickle.dumps(cascade))):
        with torch.no_grad():
            assert torch.equal(copied(*x), cascade(*x))
    assert "score='margin'" in repr(cascade)


def test_a_score_with_parameters_gets_no_gradient():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(CLASSES, 1).double()

        def forward(self, logits):
            return self.linear(logits)[:, 0]

    cascade = cascade_of(networks(), score=Learned(), threshold=0.0)
    cascade(*three_inputs()).sum().backward()
    assert all(p.grad is None for p in cascade.score.parameters())


@pytest.mark.parametrize("fuse", ["energy", "mean", "last"])
def test_derivatives_of_second_order_and_forward(fuse):
    cascade = cascade_of(networks(), fuse=fuse)
    x = [samples(6).requires_grad_() for _ in range(STAGES)]

    def call(*x):
        return cascade(*x, exit=torch.arange(6) % STAGES)

    assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, x)


def test_compiled():
    cascade = CascadeFusion(networks(), threshold=0.4, fuse="mean").eval()
    compiled = torch.compile(cascade, backend="eager")
    with torch.no_grad():
        for n in (20, 13, 7):
            x = samples(n)
            assert_close(compiled(x), cascade(x))


def test_more_stages_than_one_call_fuses():
    cascade = CascadeFusion([nn.Identity()] * 10, threshold=INF).eval()
    x = samples(5)
    with torch.no_grad():
        assert_close(cascade(x), 10 * 0.1 * x.logsumexp(1, True) * x)


def test_a_store_behind_lazy_is_copied_for_stages_in_place():
    stages = [Branch(nn.Identity(), inputs=[0]), Branch(nn.ReLU(inplace=True), inputs=[1])]
    cascade, store = CascadeFusion(stages, fuse="last").eval(), -samples(2)
    before = store.clone()
    with torch.no_grad():
        cascade(samples(4), Lazy(lambda rows: store), exit=torch.tensor([0, 1, 0, 1]))
    assert torch.equal(store, before)


def test_scores_of_half_precision_are_taken_in_single():
    cascade = CascadeFusion([nn.Identity(), nn.Identity()], fuse="last").eval()
    x = samples().half()
    with torch.no_grad():
        for cascade.score in ("probability", "margin", "entropy", "energy"):
            (actual, _), (expected, _) = cascade._run_all(x), cascade._run_all(x.double())
            assert actual.dtype is torch.float32
            torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fuse", ["energy", "mean", "last"])
def test_autocast_may_end_in_different_dtypes(fuse):
    stages = [nn.Linear(FEATURES, CLASSES), Function(lambda x: x[:, :CLASSES])]
    cascade, x, results = CascadeFusion(stages, fuse=fuse).eval(), samples().float(), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for cascade.execution in ("masked", "routed"):
            results.append(cascade(x, exit=torch.arange(N) % 2))
    assert results[0].dtype is results[1].dtype is torch.float32
    torch.testing.assert_close(*results, rtol=0.01, atol=0.01)


def test_the_example_of_the_docstring():
    assert doctest.testmod(fusion).attempted
    assert not doctest.testmod(fusion).failed


# Bad input


def test_fewer_than_two_stages():
    for stages in ([], [mlp()], {"a": mlp()}):
        with pytest.raises(ValueError, match=rf"at least two stages; got {len(stages)}"):
            CascadeFusion(stages)
    with pytest.raises(TypeError, match=r"stages must be a sequence.*int"):
        CascadeFusion(3)
    with pytest.raises(ValueError, match=r"names must differ.*twin"):
        CascadeFusion([Branch(mlp(), name="twin"), Branch(mlp(), name="twin")])


BAD_SETTINGS = [
    ("threshold", NAN, ValueError, "threshold must not be nan"),
    ("threshold", [0.5, NAN], ValueError, "threshold must not be nan"),
    ("threshold", [0.5], ValueError, "one number, or 2.*got 1"),
    ("threshold", [0.5] * 3, ValueError, "one number, or 2.*got 3"),
    ("threshold", [], ValueError, "one number, or 2.*got 0"),
    ("threshold", "high", TypeError, "threshold must be a number.*'high'"),
    ("threshold", True, TypeError, "threshold must be a number.*True"),
    ("threshold", None, TypeError, "threshold must be a number.*None"),
    ("threshold", torch.zeros(2, 1), TypeError, "threshold must be a number"),
    ("score", "maximum", ValueError, "score must be one of.*'margin'.*got 'maximum'"),
    ("score", 3, TypeError, "score must be one of.*got int"),
    ("fuse", "sum", ValueError, "fuse must be one of.*'mean'.*got 'sum'"),
    ("fuse", 3, TypeError, "fuse must be one of.*module.*got int"),
    ("execution", "dense", ValueError, "execution must be one of.*'masked'.*got 'dense'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_SETTINGS)
def test_bad_settings(name, value, error, message):
    with pytest.raises(error, match=message):
        CascadeFusion(networks(), **{name: value})
    cascade = CascadeFusion(networks())
    before = getattr(cascade, name)
    with pytest.raises(error, match=message):
        setattr(cascade, name, value)
    assert getattr(cascade, name) == before


BAD_SCORES = {
    "a column": (lambda x: x[:, :1], ValueError, r"score must return one number.*\[6\].*\[6, 1\]"),
    "too few": (lambda x: x[1:, 0], ValueError, r"score must return.*\[6\].*\[5\]"),
    "a scalar": (lambda x: x.sum(), ValueError, r"score must return.*\[6\].*\[\]"),
    "integers": (lambda x: x.argmax(1), TypeError, r"score must return a floating.*int64"),
    "bools": (lambda x: x[:, 0] > 0, TypeError, r"score must return a floating.*bool"),
    "a list": (lambda x: x[:, 0].tolist(), TypeError, r"score must return a floating.*list"),
    "writes": (lambda x: x.mul_(2)[:, 0], ValueError, r"score must not write"),
}
for_executions = pytest.mark.parametrize("execution", ["routed", "masked"])


@for_executions
@pytest.mark.parametrize(("score", "error", "message"), BAD_SCORES.values(), ids=BAD_SCORES)
def test_bad_scores(score, error, message, execution):
    cascade = CascadeFusion(networks(), score=score, execution=execution).eval()
    with torch.no_grad(), pytest.raises(error, match=message):
        cascade(samples(6))


@for_executions
@pytest.mark.parametrize("score", ["probability", "margin", "entropy"])
def test_one_class_has_no_rival(score, execution):
    cascade = CascadeFusion([mlp(1), mlp(1)], score=score, execution=execution).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=rf"score='{score}'.*\[6, 1\]"):
        cascade(samples(6))
    cascade.score = "energy"
    with torch.no_grad():
        assert cascade(samples(6)).shape == (6, 1)


ODD_STAGES = {
    "classes": (lambda x: x[:, :3], ValueError, r"odd.*\[\d, 4\], as stage 'plain'.*\[\d, 3\]"),
    "rows": (lambda x: x[1:, :4], ValueError, r"odd.*logits of shape \[(\d), 4\]"),
    "dimensions": (lambda x: x[:, :4, None], ValueError, r"odd.*\[\d, 4\].*\[\d, 4, 1\]"),
    "one dimension": (lambda x: x[:, 0], ValueError, r"odd.*\[\d, 4\].*got \[\d\]"),
    "integers": (lambda x: x[:, :4].long(), TypeError, r"odd.*floating.*int64"),
    "dtype": (lambda x: x[:, :4].float(), TypeError, r"odd.*float32.*plain.*float64"),
    "None": (lambda x: None, TypeError, r"odd.*floating logits.*NoneType"),
    "a dict": (lambda x: {"logits": x}, TypeError, r"odd.*floating logits.*dict"),
    "sparse": (lambda x: x[:, :4].to_sparse(), TypeError, r"odd.*strided"),
    "device": (lambda x: x[:, :4].to("meta"), ValueError, r"odd.*on cpu.*meta"),
}


@pytest.mark.parametrize("exit", [None, torch.tensor([0, 1, 1, 0, 1, 1])])
@pytest.mark.parametrize(("odd", "error", "message"), ODD_STAGES.values(), ids=ODD_STAGES)
def test_stages_that_do_not_fit(odd, error, message, exit, call):
    stages = {"plain": Function(lambda x: x[:, :4]), "odd": Function(odd)}
    with pytest.raises(error, match=message):
        call(CascadeFusion(stages, threshold=INF), samples(6), exit=exit)


def test_a_first_stage_that_returns_no_logits(call):
    for odd in (lambda x: x[:, 0], lambda x: x[1:], lambda x: x[:, :0]):
        with pytest.raises(ValueError, match=r"stage 0 must return logits of shape \[6, C\]"):
            call(CascadeFusion([Function(odd), mlp()]), samples(6))


BAD_FUSES = {
    "a class more": (lambda xs: F.pad(xs[0], (0, 1)), ValueError, r"fuse must return.*\[6, 5\]"),
    "rows": (lambda xs: xs[0][1:], ValueError, r"fuse must return.*\[6, 4\].*\[5, 4\]"),
    "the list": (lambda xs: xs, TypeError, r"fuse must return floating logits.*list"),
    "integers": (lambda xs: xs[0].long(), TypeError, r"fuse must return floating logits.*int64"),
    "writes": (lambda xs: xs[0].mul_(2), ValueError, r"fuse must not write"),
}


@pytest.mark.parametrize(("fuse", "error", "message"), BAD_FUSES.values(), ids=BAD_FUSES)
def test_bad_fuses(fuse, error, message):
    for train in (True, False):
        cascade = CascadeFusion(networks(), fuse=Function(fuse)).train(train)
        with torch.no_grad(), pytest.raises(error, match=message):
            cascade(samples(6))


def test_exceptions_name_the_stage_the_fuse_and_the_score():
    def fail(*_):
        raise KeyError("missing")

    plain = [Function(lambda x: x), Function(lambda x: x)]
    cascades = {
        "stage 1": CascadeFusion([plain[0], Function(fail)], threshold=INF),
        "fuse": CascadeFusion(plain, fuse=Function(fail)),
        "score": CascadeFusion(plain, score=fail),
    }
    for where, cascade in cascades.items():
        with torch.no_grad(), pytest.raises(KeyError, match="missing") as caught:
            cascade.eval()(samples())
        assert f"in {where}" in caught.value.__notes__


BAD_EXITS = [
    (STAGES, ValueError, r"exit must be in 0\.\.2.*got 3"),
    (-1, ValueError, r"exit must be in 0\.\.2.*got -1"),
    (True, TypeError, r"exit must be an int or a LongTensor \[N\]; got True"),
    ("random", TypeError, r"exit must be an int or a LongTensor \[N\]; got 'random'"),
    (1.0, TypeError, r"exit must be an int or a LongTensor \[N\]; got 1\.0"),
    (torch.zeros(6), TypeError, r"exit must be.*float32"),
    (torch.zeros(6, dtype=torch.bool), TypeError, r"exit must be.*bool"),
    (torch.zeros(5, dtype=torch.int64), ValueError, r"exit must have shape \[6\]; got \[5\]"),
    (torch.zeros(6, 1, dtype=torch.int64), ValueError, r"exit must have shape \[6\].*\[6, 1\]"),
    (torch.tensor([0, 1, 3, 0, 1, 9]), ValueError, r"exit must be in 0\.\.2; got 3 in row 2 \(2"),
    (torch.tensor([0, 1, 2, -1, 1, 0]), ValueError, r"exit must be in 0\.\.2; got -1 in row 3"),
    (torch.zeros(6, device="meta").long(), ValueError, r"exit must be on cpu.*meta"),
]


@pytest.mark.parametrize(("exit", "error", "message"), BAD_EXITS)
def test_bad_exits(exit, error, message, call):
    with pytest.raises(error, match=message):
        call(CascadeFusion(networks()), samples(6), exit=exit)


def routing_of(train: bool = True) -> CascadeRouting:
    with torch.no_grad():
        cascade = CascadeFusion(networks()).train(train)
        return cascade(samples(6), exit=None if train else 0, return_routing=True)[1]


CLASS_TARGETS = torch.zeros(6, dtype=torch.int64)
BAD_TARGETS = [
    (CLASS_TARGETS[1:], ValueError, r"targets must be int64 \[6\] or floating \[6, 4\].*\[5\]"),
    (torch.zeros(6), ValueError, r"targets must be int64 \[6\].*float32 \[6\]"),
    (torch.zeros(6, 5), ValueError, r"targets must be.*\[6, 5\]"),
    (CLASS_TARGETS.int(), TypeError, r"targets must be.*int32"),
    ([0] * 6, TypeError, r"targets must be.*list"),
    (CLASS_TARGETS + 4, ValueError, r"targets must be in 0\.\.3; got 4"),
    (CLASS_TARGETS - 100, ValueError, r"targets must be in 0\.\.3; got -100"),
    (torch.full((6, 4), 1.5), ValueError, r"targets must be in 0\.\.1; got 1\.5"),
    (torch.full((6, 4), NAN), ValueError, r"targets must be in 0\.\.1; got nan"),
]


@pytest.mark.parametrize(("targets", "error", "message"), BAD_TARGETS)
def test_bad_targets(targets, error, message):
    with pytest.raises(error, match=message):
        deep_supervision_loss(routing_of(), targets)


def test_bad_deep_supervision():
    for weights in ([1.0], [1.0] * 4, [1.0, -1.0, 1.0], [1.0, NAN, 1.0]):
        with pytest.raises(ValueError, match=r"weights must be 3 numbers"):
            deep_supervision_loss(routing_of(), CLASS_TARGETS, weights)
    with pytest.raises(ValueError, match=r"no exits.*cascade\.train\(\)"):
        deep_supervision_loss(routing_of(train=False), CLASS_TARGETS)
    with pytest.raises(TypeError, match=r"CascadeRouting.*Tensor"):
        deep_supervision_loss(samples(), CLASS_TARGETS)
