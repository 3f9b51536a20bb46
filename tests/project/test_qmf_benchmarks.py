"""The benchmarks of QMF: what they time is right, in fp64 and of small size."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import cascade, energy, history, qmf, summary
from benchmarks.cascade import CascadeProblem, CascadeSetting
from benchmarks.energy import EnergySetting
from benchmarks.history import HistorySetting, NumpyHistory
from dynmm_kernels import EnergyFusion
from dynmm_kernels.measure.timing import ONCE

CASES = [("text-image", 5, p) for p in (0.0, 0.4, 1.0)]
CASES += [("text-image", 1, p) for p in (0.0, 1.0)] + [("rgb-d", 4, 0.5)]


class Pooled(nn.Module):
    """Stands for an image encoder, which would take seconds in fp64."""

    def __init__(self, classes: int):
        super().__init__()
        self.head = nn.Linear(3 * 16, classes)

    def forward(self, image):
        return self.head(nn.functional.adaptive_avg_pool2d(image, 4).flatten(1))


@pytest.fixture
def small(monkeypatch):
    """Pairs with encoders of no size."""

    def text_and_image(shortened):
        return {"text": qmf.TextEncoder(7, layers=1, width=24), "image": Pooled(7)}

    def rgb_and_depth(shortened):
        return {"rgb": Pooled(7), "depth": Pooled(7)}

    monkeypatch.setattr(qmf, "VOCABULARY", 50)
    for name, build in (("text-image", text_and_image), ("rgb-d", rgb_and_depth)):
        monkeypatch.setitem(qmf.PAIRS, name, replace(qmf.PAIRS[name], build=build))
    qmf.cascade_costs.cache_clear()
    yield
    qmf.cascade_costs.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cascade_rows(small, case):
    """Every row is what both encoders give, of which each sample has its own exit."""
    problem = CascadeProblem(CascadeSetting(*case, shortened=True, dtype=torch.float64))
    with torch.no_grad():
        errors = problem.errors()
        fused = EnergyFusion(problem.branches()).eval()(problem.inputs)
        torch.testing.assert_close(problem.full(), fused, rtol=1e-12, atol=1e-12)
        _, routing = problem.cascade(problem.inputs, return_routing=True)
    assert list(errors) == list(cascade.ROWS)
    assert max(errors.values()) < 1e-12
    assert routing.counts == problem.setting.counts
    assert torch.equal(routing.choice, problem.exits)


def test_a_wrong_exit_is_noticed(small):
    problem = CascadeProblem(CascadeSetting("rgb-d", 4, 0.5, shortened=True, dtype=torch.float64))
    problem.exits = 1 - problem.exits
    with torch.no_grad():
        errors = problem.errors()
    assert errors["cascade"] > 1e-2
    assert max(errors[row] for row in ("full", "forced", "bare")) < 1e-12


def test_text_encoder_ignores_padding():
    encoder = qmf.TextEncoder(3, layers=1, width=24).double().eval()
    ids = torch.randint(50, (2, 8))
    mask = torch.arange(8) < torch.tensor([[5], [8]])
    with torch.no_grad():
        expected = encoder(ids[:1, :5], mask[:1, :5])
        ids[0, 5:] = 7
        torch.testing.assert_close(encoder(ids, mask)[:1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pair", qmf.PAIRS)
def test_encoders_return_classes(pair):
    """The models as they are timed."""
    pair = qmf.PAIRS[pair]
    inputs = pair.make_inputs(2, shortened=True)
    with torch.no_grad():
        for name, encoder in pair.make_encoders(shortened=True).items():
            logits = encoder(*pair.reads(name, inputs))
            assert logits.shape == (2, 101 if pair.name == "text-image" else 10)
            assert logits.isfinite().all()


@pytest.mark.parametrize("step", energy.STEPS)
@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_energy_rows(step, modalities):
    setting = EnergySetting(33, 5, step, dtype=torch.float64, modalities=modalities)
    contest = energy.contest(setting)
    assert max(contest.errors.values()) < 1e-12
    assert [*contest.rows] == ["dynmm_kernels", "torch", "clone"]
    results = contest.rows["dynmm_kernels"].call()
    gradients = modalities if step == "training" else 0
    assert len(results) == (2 if step == "forward" else 3) + gradients


@pytest.mark.parametrize("size", [40, 795])
def test_history_rows(size):
    assert max(history.contest(HistorySetting(size, n=32)).errors.values()) < 1e-4


def test_numpy_history_is_the_published_loss():
    """By a sum over pairs, of which the last sample makes one with the first."""
    total, indices = torch.rand(9, 2), torch.tensor([4, 1, 7])
    confidence = torch.randn(3, 2, dtype=torch.float64)
    quality = (total - total.amin(0)) / (total.amax(0) - total.amin(0))
    expected = torch.zeros(2, dtype=torch.float64)
    for m in range(2):
        for i, j in ((0, 1), (1, 2), (2, 0)):
            gap = (quality[indices[i], m] - quality[indices[j], m]).item()
            difference = (confidence[i, m] - confidence[j, m]).item()
            expected[m] += max(0, np.sign(gap) * difference - abs(gap)) / 3
    actual = NumpyHistory(total).rank_loss(confidence, indices)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class Other:
    """A setting of another benchmark."""


def test_summary(small):
    settings = {
        CascadeSetting("rgb-d", 4, 0.5, shortened=True): cascade.contest,
        EnergySetting(16, 3, "training"): energy.contest,
        HistorySetting(795): history.contest,
    }
    with torch.no_grad():
        outcomes = {Other(): None}
        for setting, contest in settings.items():
            with torch.set_grad_enabled(not isinstance(setting, CascadeSetting)):
                outcomes[setting] = contest(setting).run(ONCE)
    rows = summary.qmf_rows(outcomes)
    assert [row["row"] for row in rows["cascades"]] == ["cascade", "forced"]
    assert {name: len(found) for name, found in rows.items()} == {
        "cascades": 2,
        "energy_fuse": 1,
        "history": 1,
    }
    text = "\n".join(summary.qmf_tables(outcomes))
    for setting in settings:
        assert str(setting) in text
    assert summary.qmf_tables({Other(): None}) == []
