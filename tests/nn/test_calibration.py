"""Calibrated exits: the test against a hand computation and MAPIE, the guarantee on real digits."""

import math
import re
import sys
import warnings

import numpy as np
import pytest
import torch

from dynmm_kernels import Branch, CascadeFusion
from dynmm_kernels.nn.cascade import calibration, learn_then_test
from dynmm_kernels.nn.cascade.calibration import Calibration, calibrate

sklearn = pytest.importorskip("sklearn")


def tail(losses: int, rows: int, target: float) -> float:
    """P(Binomial(rows, target) <= losses)."""
    return math.fsum(
        math.comb(rows, k) * target**k * (1 - target) ** (rows - k) for k in range(losses + 1)
    )


@pytest.fixture(scope="module")
def digits():
    """Scores [1797, 2], exits [1797, 3] and labels: held-out predictions for every digit.

    The stages see the left half, the right half and all of it; each digit's come from models that
    learned on the half of the data without it. Late fusion: mean of what is there.
    """
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    views = [images[:, :, :4], images[:, :, 4:], images]
    fold = np.random.RandomState(0).permutation(len(labels)) % 2
    logits = np.empty((len(labels), len(views), 10))
    for stage, view in enumerate(views):
        flat = view.reshape(len(view), -1)
        for held_out in (fold == 0, fold == 1):
            model = LogisticRegression(max_iter=300).fit(flat[~held_out], labels[~held_out])
            logits[held_out, stage] = model.predict_log_proba(flat[held_out])
    fused = torch.from_numpy(logits.cumsum(1) / np.arange(1, len(views) + 1)[:, None])
    scores = fused.softmax(-1).amax(-1)[:, :-1].numpy()
    return scores, fused.argmax(-1).numpy(), labels


def drawn(rows: int, stages: int = 3, seed: int = 0):
    """Made-up rows: the surer a stage, the more often it is right."""
    random = np.random.RandomState(seed)
    scores = random.rand(rows, stages - 1).round(2)  # with ties
    targets = random.randint(0, 4, rows)
    right = random.rand(rows, stages) < np.concatenate([scores, np.full((rows, 1), 0.98)], axis=1)
    return scores, np.where(right, targets[:, None], (targets[:, None] + 1) % 4), targets


def loss(risk: str, exit: int, full: int, target: int) -> int:
    if risk == "consistency":
        return int(exit != full)
    wrong = int(exit != target)
    return max(0, wrong - int(full != target)) if risk == "gap" else wrong


@pytest.mark.parametrize("target", [0.004, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("delta", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("rows", [1, 44, 45, 230, 500])
def test_one_candidate(rows, delta, target):
    allowed = 0  # as many losses are one too many
    while allowed < rows and tail(allowed, rows, target) <= delta:
        allowed += 1
    for losses in {0, allowed - 1, allowed, rows} - {-1}:
        column = np.arange(rows)[:, None] < losses
        passes = losses < allowed
        assert learn_then_test.fixed_sequence(column, target, delta) == passes
        bound = learn_then_test.upper_bounds(np.array([losses]), rows, delta)[0]
        assert (bound <= target) == passes
        assert losses == rows or tail(losses, rows, bound) == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "target", "allowed"),
    [(500, 0.01, 1), (500, 0.02, 5), (1000, 0.01, 5), (1000, 0.02, 13), (5000, 0.02, 86)],
)
def test_allowed_losses(rows, target, allowed):
    losses = np.arange(rows)[:, None] < np.arange(rows // 10)
    assert learn_then_test.fixed_sequence(losses, target, 0.1) == allowed + 1


def test_the_walk_ends_at_the_first_that_fails():
    losses = np.zeros((300, 5), dtype=bool)
    losses[:10, 2] = True
    assert learn_then_test.fixed_sequence(losses, 0.01, 0.1) == 2
    losses[:10, 0] = True
    assert learn_then_test.fixed_sequence(losses, 0.01, 0.1) == 0


@pytest.mark.parametrize(
    ("target", "delta", "needed"),
    [
        (0.01, 0.1, 230),
        (0.01, 0.05, 299),
        (0.005, 0.1, 460),
        (0.005, 0.05, 598),
        (0.02, 0.1, 114),
        (0.02, 0.05, 149),
        (0.05, 0.1, 45),
        (0.05, 0.05, 59),
        (0.5, 0.25, 2),
    ],
)
def test_too_few_rows(target, delta, needed):
    assert learn_then_test.rows_needed(target, delta) == needed
    scores, exits, targets = drawn(2 * needed - 1)
    assert calibrate(scores, exits, targets, target=target, delta=delta).n == needed
    wanted = f"{2 * needed - 2} rows are too few.*takes {needed} there, so {2 * needed - 1} rows"
    with pytest.raises(ValueError, match=wanted):
        calibrate(scores[1:], exits[1:], targets[1:], target=target, delta=delta)


def test_no_row():
    scores, exits, targets = drawn(0)
    with pytest.raises(ValueError, match="0 rows are too few"):
        calibrate(scores, exits, targets)
    with pytest.raises(ValueError, match=r"1 rows are too few.*2 rows in all"):
        calibrate(*drawn(1), target=0.95, delta=0.1)


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("risk", calibration.RISKS)
def test_against_a_loop(risk, stages):
    scores, exits, targets = drawn(700, stages)
    costs = [1.0, 3.0, 5.0, 2.5, 4.0][:stages]
    result = calibrate(scores, exits, targets, costs, risk=risk, target=0.1)
    learning, testing = learn_then_test.halves(700)
    assert sorted([*learning, *testing]) == [*range(700)]
    assert result.n == len(testing) == 350
    harmless = [
        [not loss(risk, exits[i, s], exits[i, -1], targets[i]) for s in range(stages - 1)]
        for i in learning
    ]
    _, thresholds = learn_then_test.family(scores[learning], np.array(harmless))
    assert len(thresholds) == len(result.curve)
    assert tuple(thresholds[result.accepted - 1]) == result.thresholds
    for levels, point in zip(thresholds, result.curve, strict=True):
        there = [[] for _ in range(stages)]
        for i in testing:
            reached = [s for s in range(stages - 1) if scores[i, s] >= levels[s]]
            s = reached[0] if reached else stages - 1
            there[s].append(loss(risk, exits[i, s], exits[i, -1], targets[i]))
        losses = sum(map(sum, there))
        assert point.risk == losses / 350
        assert (tail(losses, 350, 0.1) <= 0.1) == (point.bound <= 0.1)
        assert point.leaving == tuple(len(own) / 350 for own in there)
        spent = sum(len(own) * sum(costs[: s + 1]) for s, own in enumerate(there))
        assert point.cost == pytest.approx(spent / 350, rel=1e-12)
        if point is result.chosen:
            assert [one.rows for one in result.per_exit] == list(map(len, there))
            for one, own in zip(result.per_exit, there, strict=True):
                assert one.risk == (pytest.approx(np.mean(own)) if own else None)
    passes = [point.bound <= 0.1 for point in result.curve]
    assert all(passes[: result.accepted])
    assert not passes[result.accepted]
    assert 1 - result.leaving[-1] > 0.05


@pytest.mark.parametrize("rows", [1, 2, 50, 400])
def test_thresholds_are_those_of_one_probability(rows, monkeypatch):
    from sklearn.isotonic import IsotonicRegression

    monkeypatch.setattr(learn_then_test, "GRID", 10**6)
    scores, exits, _ = drawn(rows)
    harmless = exits[:, :-1] == exits[:, -1:]
    probabilities, thresholds = learn_then_test.family(scores, harmless)
    keys = []  # of every row and stage: its probability, then its rank
    for own, right in zip(scores.T, harmless.T, strict=True):
        mapped = IsotonicRegression().fit(own, right).predict(own)
        ranks = np.searchsorted(np.sort(own), own, "right")
        keys.append(list(zip(mapped, ranks, strict=True)))
    values = sorted({key for column in keys for key in column}, reverse=True)
    assert np.isinf([probabilities[0], *thresholds[0]]).all()
    assert len(thresholds) == len(values) + 1
    for (value, rank), found, levels in zip(values, probabilities[1:], thresholds[1:], strict=True):
        assert found == pytest.approx(value, rel=1e-12)
        for own, column, level in zip(scores.T, keys, levels, strict=True):
            assert [*(own >= level)] == [key >= (value, rank) for key in column]


def test_of_many_candidates_some_are_tried():
    scores = np.random.RandomState(0).rand(4000, 2)
    _, thresholds = learn_then_test.family(scores, np.ones(scores.shape, dtype=bool))
    assert len(thresholds) == learn_then_test.GRID
    assert np.isinf(thresholds[0]).all()
    assert (thresholds[-1] == scores.min(0)).all()
    assert (np.diff(thresholds[1:], axis=0) <= 0).all()


def realised(result: Calibration, digits, rows, risk: str = "gap") -> tuple[float, float]:
    """The risk of the thresholds, and the share that leaves early, on these rows."""
    scores, exits, labels = (part[rows] for part in digits)
    after = learn_then_test.leave(scores, np.array(result.thresholds))
    each, full = np.take_along_axis(exits, after[:, None], 1)[:, 0], exits[:, -1]
    losses = {
        "gap": (each != labels) & (full == labels),
        "consistency": each != full,
        "error": each != labels,
    }[risk]
    return np.mean(losses), np.mean(after < scores.shape[1])


@pytest.mark.parametrize("draw", ["split", "with replacement"])
@pytest.mark.parametrize(
    ("risk", "target"), [("gap", 0.02), ("consistency", 0.02), ("error", 0.12)]
)
def test_guarantee_on_digits(digits, risk, target, draw):
    """200 times, calibrate on 600 random digits and look at the others.

    The 1197 others are a sample, too: their risk scatters around that of the thresholds. All
    digits, of which the calibration rows are a random draw, have no such error.
    """
    everyone = np.arange(len(digits[2]))
    above_rest = above_all = 0
    early = []
    for seed in range(200):
        random = np.random.RandomState(seed)
        order = random.permutation(everyone) if draw == "split" else random.choice(everyone, 1797)
        own, rest = order[:600], order[600:]
        result = calibrate(*(part[own] for part in digits), risk=risk, target=target)
        observed, share = realised(result, digits, rest, risk)
        above_rest += observed > target
        above_all += realised(result, digits, everyone, risk)[0] > target
        early.append(share)
    assert above_all <= 20
    assert above_rest <= 20
    assert np.mean(early) > 1 / 2


def test_monotone_in_target_and_delta(digits):
    chosen = [calibrate(*digits, target=x).accepted for x in (0.003, 0.01, 0.02, 0.05, 0.2)]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]
    chosen = [calibrate(*digits, delta=x).accepted for x in (0.01, 0.1, 0.3, 0.9)]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]


def test_consistency_reads_no_targets(digits):
    scores, exits, labels = digits
    result = calibrate(scores, exits, None, risk="consistency", target=0.02)
    assert result == calibrate(scores, exits, labels, risk="consistency", target=0.02)
    assert result.leaving[-1] < 2 / 3
    assert result.chosen.cost == pytest.approx(np.dot(result.leaving, [1, 2, 3]))


@pytest.mark.parametrize("target", [0.01, 0.02, 0.05, 0.08])
@pytest.mark.parametrize("risk", calibration.RISKS)
def test_like_mapie(digits, risk, target):
    control = pytest.importorskip("mapie.risk_control")
    # 512 rows are held out: mapie rounds losses / n * n up, which is exact for a power of two.
    scores, exits, labels = (part[:1024] for part in digits)
    scores, exits = scores[:, :1], exits[:, [0, 2]]
    losses = np.array(
        [
            [loss(risk, each, row[-1], label) for each in row]
            for row, label in zip(exits, labels, strict=True)
        ]
    )
    learning, testing = learn_then_test.halves(1024)
    _, thresholds = learn_then_test.family(scores[learning], ~losses[learning, :-1])
    controller = control.BinaryClassificationController(
        lambda rows: np.stack([1 - scores[rows, 0], scores[rows, 0]], axis=1),
        risk=control.BinaryRisk(  # y: 2 * loss when leaving + loss when staying
            lambda y, leaves: np.where(leaves, y // 2, y % 2) == 1,
            lambda y, leaves: np.ones(len(y), dtype=bool),
            higher_is_better=False,
        ),
        target_level=target,
        confidence_level=0.9,
        best_predict_param_choice="predicted_positive_fraction",
        list_predict_params=thresholds[:, 0],
        fwer_method="fixed_sequence",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a risk that does not grow everywhere; none accepted
        controller.calibrate(testing, 2 * losses[testing, 0] + losses[testing, 1])
    theirs = controller.valid_predict_params
    try:
        ours = calibrate(scores, exits, labels, risk=risk, target=target, delta=0.1)
    except ValueError:
        assert risk == "error"
        assert len(theirs) == 0
        return
    assert len(theirs) == ours.accepted > 1
    assert (theirs == thresholds[: ours.accepted, 0]).all()
    assert ours.thresholds == (theirs[-1],)


def test_an_error_that_no_exit_can_mend():
    scores, exits, targets = drawn(700)
    exits[::5] = (targets[::5, None] + 1) % 4
    with pytest.raises(ValueError, match=r"wrong on \d+ of 350 rows, 0\.[12].*target=0\.1;.*gap"):
        calibrate(scores, exits, targets, risk="error", target=0.1)
    assert calibrate(scores, exits, targets, risk="gap", target=0.1).accepted > 1


def test_nobody_or_everybody_leaves():
    scores, exits, targets = drawn(600)
    exits[:, -1] = targets
    exits[:, :-1] = (targets[:, None] + 1) % 4
    result = calibrate(scores, exits, targets, [2, 3, 4])
    assert result.thresholds == (math.inf, math.inf)
    assert result.leaving == (0, 0, 1)
    assert result.chosen.cost == 9
    assert result.chosen.threshold == math.inf
    assert [one.risk for one in result.per_exit] == [None, None, 0]
    assert result.guarantee.endswith("Nobody leaves early.")
    exits[:] = targets[:, None]
    result = calibrate(scores, exits, targets, [2, 3, 4])
    assert result.accepted == len(result.curve)
    assert result.leaving == (1, 0, 0)
    assert result.chosen.cost == 2
    assert [one.risk for one in result.per_exit] == [0, None, None]


def test_few_may_pay_for_all():
    """The target holds for all samples together; `per_exit` shows who bears the losses."""
    random = np.random.RandomState(0)
    targets = random.randint(0, 4, 4000)
    scores, exits = random.rand(4000, 2), targets[:, None].repeat(3, 1)
    few = random.rand(4000) < 0.02
    scores[few, 0] += 1
    scores[~few, 0] /= 1e6
    exits[few, 0] = (exits[few, 0] + random.randint(0, 2, few.sum())) % 4
    exits[~few, 0] = (exits[~few, 0] + 1) % 4
    result = calibrate(scores, exits, targets, target=0.02)
    assert result.chosen.bound <= 0.02
    first, second, _ = result.per_exit
    assert first.rows < 0.03 * result.n
    assert first.risk > 0.3
    assert second.risk == 0


def test_what_is_said(digits):
    result = calibrate(*digits, target=0.02, delta=0.05)
    assert re.fullmatch(
        r"With probability at least 0\.95 over the draw of the rows, the cascade is wrong where "
        r"running every stage is right for at most 2 % of samples drawn as they were \(exact "
        r"binomial test on 899 rows held out\)\.",
        result.guarantee,
    )
    assert (result.n, result.risk, result.target, result.delta) == (899, "gap", 0.02, 0.05)
    assert sum(one.rows for one in result.per_exit) == result.n
    assert sum(one.rows * (one.risk or 0) for one in result.per_exit) == pytest.approx(
        result.chosen.risk * result.n
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors(digits, dtype):
    """The thresholds are scores that came, so that a comparison in their own type is exact."""
    scores, exits, labels = map(torch.from_numpy, digits)
    scores = scores.to(dtype).requires_grad_()
    state = torch.get_rng_state()
    result = calibrate(scores, exits, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert result == calibrate(scores.detach().double().numpy(), exits.int(), labels.int())
    for stage, threshold in enumerate(result.thresholds):
        own = scores[:, stage].detach()
        assert threshold in own.double().tolist()
        assert torch.equal(own >= threshold, own.double() >= threshold)


def test_plot(digits, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    result = calibrate(*digits)
    result.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    axes = matplotlib.figure.Figure().subplots()
    result.plot(axes)
    risk, bound, _, chosen = axes.lines
    assert list(risk.get_ydata()) == [point.risk for point in result.curve]
    assert list(bound.get_ydata()) == [point.bound for point in result.curve]
    assert chosen.get_xydata().tolist() == [[1 - result.leaving[-1], result.chosen.risk]]


@pytest.mark.parametrize("module", ["sklearn.isotonic", "scipy.stats"])
def test_without_the_libraries(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        calibrate(*drawn(600))


def test_plot_without_matplotlib(digits, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        calibrate(*digits).plot(tmp_path / "curve.png")


def spoiled(array, where, value):
    array = array.copy()
    array[where] = value
    return array


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"risk": "loss"}, ValueError, "risk must be one of gap, consistency, error; got 'loss'"),
        ({"target": 0.0}, ValueError, "target must be above 0 and below 1; got 0.0"),
        ({"target": math.nan}, ValueError, "target must be above 0"),
        ({"delta": 1}, ValueError, "delta must be above 0 and below 1; got 1"),
        ({"targets": None}, ValueError, "risk 'gap' needs targets; .*risk='consistency'"),
        ({"targets": np.zeros(599, int)}, ValueError, r"targets must be \[n\] = \[600\].*\[599\]"),
        ({"targets": np.zeros((600, 3), int)}, ValueError, r"targets must be \[n\].*\[600, 3\]"),
        ({"targets": np.zeros(600)}, TypeError, "targets must be integers.*float64"),
        ({"targets": np.full(600, -100)}, ValueError, r"targets must be at least 0; got -100"),
        (
            {"targets": spoiled(np.zeros(600, int), 7, 4), "classes": 4},
            ValueError,
            r"targets must be in 0\.\.3; got 4 in row 7 \(1 such",
        ),
        ({"classes": 2}, ValueError, r"exits must be in 0\.\.1; got [23] in row"),
        ({"exits": np.zeros((600, 3))}, TypeError, "exits must be integers.*float64"),
        ({"exits": np.zeros((600, 1), int)}, ValueError, r"exits must be.*two.*\[600, 1\]"),
        ({"exits": np.zeros(600, int)}, ValueError, r"exits must be.*\[600\]"),
        ({"scores": np.zeros((600, 3))}, ValueError, r"= \[600, 2\].*got \[600, 3\]"),
        ({"scores": np.zeros((600, 2), int)}, TypeError, "scores must be floating; got int64"),
        (
            {"scores": spoiled(np.zeros((600, 2)), (5, 1), np.nan)},
            ValueError,
            "scores must be finite; got nan in row 5, stage 1",
        ),
        ({"scores": spoiled(np.zeros((600, 2)), (5, 1), np.inf)}, ValueError, "got inf in row 5"),
        ({"costs": [1, 2]}, ValueError, r"costs must be 3 finite numbers.*got \[1, 2\]"),
        ({"costs": [1, 2, -1]}, ValueError, "costs must be 3 finite numbers"),
        ({"costs": [1, 2, math.nan]}, ValueError, "costs must be 3 finite numbers"),
    ],
)
def test_refusals(change, error, message):
    scores, exits, targets = drawn(600)
    arguments = {"scores": scores, "exits": exits, "targets": targets} | change
    with pytest.raises(error, match=f"calibrate: .*{message}"):
        calibrate(**arguments)


class Slow(torch.nn.Module):
    """A stage that is right more often the later it comes, for rows of [target, difficulty]."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power
        self.norm = torch.nn.BatchNorm1d(2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        target, difficulty = rows[:, 0].long(), rows[:, 1]
        solved = difficulty < self.power
        named = torch.where(solved, target, (target + 1) % 4)
        size = torch.where(solved, 6.0, 4 * (1 - difficulty))
        return size[:, None] * torch.nn.functional.one_hot(named, 4)


def samples(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.randint(0, 4, (rows,))
    return torch.stack([targets.float(), torch.rand(rows)], 1), targets


def cascade() -> CascadeFusion:
    stages = [Branch(Slow(power), cost=cost) for power, cost in ((0.6, 1.0), (0.95, 9.0))]
    return CascadeFusion(stages, fuse="last")


@pytest.mark.parametrize("risk", calibration.RISKS)
def test_a_cascade(risk):
    """The thresholds are set, and keep the risk on samples drawn likewise."""
    fusion = cascade().train()
    fusion.stages[1].eval()
    inputs, targets = samples(1000)
    known = None if risk == "consistency" else targets
    batches = [
        ((inputs[rows],), None if known is None else known[rows])
        for rows in (slice(0, 600), slice(600, None))
    ]
    found = fusion.calibrate(batches, risk=risk, target=0.1, delta=0.1)
    assert [fusion.training, *(stage.training for stage in fusion.stages)] == [True, True, False]
    assert fusion.threshold == fusion.thresholds == found.thresholds
    assert found.n == 500
    assert "at least 0.9" in found.guarantee
    assert "at most 10 %" in found.guarantee
    assert found.leaving[0] > 0.4
    assert found.chosen.cost == pytest.approx(10 - 9 * found.leaving[0])
    inputs, targets = samples(20_000)
    with torch.no_grad():
        early, routing = fusion.eval()(inputs, return_routing=True)
        full = fusion(inputs, exit=1)
    assert routing.fractions[0] == pytest.approx(found.leaving[0], abs=0.06)
    wrong = early.argmax(1) != targets
    lost = {
        "error": wrong,
        "gap": wrong & (full.argmax(1) == targets),
        "consistency": early.argmax(1) != full.argmax(1),
    }
    assert lost[risk].float().mean() <= 0.1


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (lambda x, y: [], ValueError, "batches is empty"),
        (lambda x, y: [x], ValueError, r"must give \(inputs, targets\).*Tensor"),
        (lambda x, y: [(x, y)], TypeError, "inputs of batch 0 must be a tuple.*Tensor"),
        (lambda x, y: [((x,), y), ((x,), None)], ValueError, "got them for 1 of 2"),
        (lambda x, y: [((x,), None)], ValueError, "targets"),
        (lambda x, y: [((x,), y + 1)], ValueError, r"targets must be in 0\.\.3; got 4"),
        (lambda x, y: [((x[:50],), y[:50])], ValueError, "50 rows are too few.*459 rows in all"),
    ],
)
def test_refusals_of_a_cascade(batches, error, message):
    fusion = cascade()
    with pytest.raises(error, match=message):
        fusion.calibrate(batches(*samples(600)))
    assert fusion.threshold == 0.9
