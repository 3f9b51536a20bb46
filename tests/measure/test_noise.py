"""The noise of QMF's robustness protocol: how much, where, and that the rest is left alone."""

import pytest
import torch

from dynmm_kernels.measure.noise import corrupt

KINDS = ["gaussian", "salt_and_pepper"]
for_kinds = pytest.mark.parametrize("kind", KINDS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_modality_is_noisy_by_itself():
    """A quarter of the samples each: clean, one, the other, both."""
    size = 40_000
    _, rows = corrupt([torch.zeros(size, 1)] * 2, epsilon=5, generator=seeded())
    pairs = torch.bincount(rows[:, 0] + 2 * rows[:, 1].int(), minlength=4) / size
    assert pairs.tolist() == pytest.approx([0.25] * 4, abs=0.01)
    _, rows = corrupt([torch.zeros(size, 1)] * 3, epsilon=5, share=0.2, generator=seeded())
    assert rows.float().mean(0).tolist() == pytest.approx([0.2] * 3, abs=0.01)


def test_gaussian_noise_has_its_deviation_in_pixels():
    clean = [torch.full((2000, 1, 8, 8), 0.3), torch.full((2000, 50), 70.0)]
    noisy, rows = corrupt(clean, epsilon=10, unit=[1 / 255, 1.0], generator=seeded())
    for m, step in enumerate((1 / 255, 1.0)):
        noise = (noisy[m] - clean[m])[rows[:, m]]
        assert noise.mean().item() == pytest.approx(0, abs=0.2 * step)
        assert noise.std().item() == pytest.approx(10 * step, rel=0.02)
        assert noise[0].std() > 0  # pixels differ
        assert (noise[0] != noise[1]).all()  # and images do


def test_channels_share_their_noise():
    clean = torch.rand(64, 3, 4, 4)
    noisy, rows = corrupt([clean], epsilon=10, share=1.0, generator=seeded())
    noise = noisy[0] - clean
    torch.testing.assert_close(noise, noise[:, :1].expand_as(noise), rtol=0, atol=1e-6)
    noisy, _ = corrupt([clean], epsilon=10, share=1.0, same_channels=False, generator=seeded())
    assert ((noisy[0] - clean)[:, 0] - (noisy[0] - clean)[:, 1]).abs().mean() > 0.01
    assert rows.all()
    features = corrupt([torch.zeros(64, 9)], epsilon=10, share=1.0, generator=seeded())[0][0]
    assert (features[:, 0] != features[:, 1]).all()  # dimension 1 is none of channels


def test_scales_broadcast_to_a_sample():
    """As after a normalisation by channel."""
    std, mean = (torch.tensor(x).view(3, 1, 1) for x in ([0.1, 0.2, 0.5], [0.4, 0.5, 0.6]))
    images = torch.rand(3000, 3, 4, 4)
    settings = {"epsilon": 10, "share": 1.0}
    plain = corrupt([images], generator=seeded(), **settings)[0][0]
    scaled = corrupt([(images - mean) / std], generator=seeded(), unit=1 / (255 * std), **settings)
    torch.testing.assert_close(scaled[0][0] * std + mean, plain)


def test_salt_and_pepper_hits_one_pixel_in_ten():
    clean = torch.full((20_000, 3, 5, 5), 100.0)
    (noisy,), rows = corrupt([clean], KINDS[1], epsilon=40, unit=1.0, generator=seeded())
    assert rows.float().mean().item() == pytest.approx(0.5 * 0.4, abs=0.01)
    pixels = noisy[rows[:, 0]]
    assert {*pixels.unique().tolist()} == {0, 100, 255}
    assert (pixels == pixels[:, :1]).all()
    assert (pixels == 0).float().mean().item() == pytest.approx(0.05, abs=0.003)
    assert (pixels == 255).float().mean().item() == pytest.approx(0.05, abs=0.003)
    given = {"unit": 2.0, "black": -3.0, "density": 1.0}
    (noisy,), _ = corrupt([clean], KINDS[1], epsilon=100, share=1.0, **given)
    assert {*noisy.unique().tolist()} == {-3, 507}


@for_kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_without_noise_are_left_alone(kind, dtype):
    clean = [torch.randn(200, 3, 4, 4).to(dtype), torch.randn(200, 7).to(dtype)]
    clean[1][:, 0], clean[1][:, 1] = float("nan"), -0.0
    given = [x.clone() for x in clean]
    noisy, rows = corrupt(clean, kind, epsilon=50, share=0.5, generator=seeded())
    for m in range(2):
        whole = [x.reshape(200, -1).view(torch.uint8) for x in (clean[m], given[m], noisy[m])]
        assert torch.equal(whole[0], whole[1])  # what came is not written to
        changed = (whole[0] != whole[2]).any(1)
        assert not changed[~rows[:, m]].any()
        assert changed.any()
        assert noisy[m].dtype == dtype
        assert noisy[m].data_ptr() != clean[m].data_ptr()


@for_kinds
def test_no_severity_is_no_noise(kind):
    clean = torch.randn(100, 4)
    clean[:, 0] = -0.0
    (noisy,), rows = corrupt([clean], kind, epsilon=0, share=1.0)
    assert torch.equal(noisy.view(torch.int32), clean.view(torch.int32))
    assert not rows.any()


@for_kinds
def test_a_generator_repeats_it(kind):
    clean = [torch.rand(50, 3, 4, 4), torch.rand(50, 6)]
    first, again, other = (corrupt(clean, kind, epsilon=60, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.rows, again.rows)
    assert all(map(torch.equal, first.modalities, again.modalities))
    assert not torch.equal(first.rows, other.rows)
    if kind == "gaussian":  # severities are compared on the same rows
        assert torch.equal(corrupt(clean, epsilon=1, generator=seeded(1)).rows, first.rows)


def test_clipped_noise_ends_at_black_and_white():
    clean = torch.rand(500, 6)
    loose = corrupt([clean], epsilon=100, share=1.0, generator=seeded())[0][0]
    tight = corrupt([clean], epsilon=100, share=1.0, clip=True, generator=seeded())[0][0]
    assert loose.min() < 0 < 1 < loose.max()
    torch.testing.assert_close(tight, loose.clamp(0, 1))


def test_small_batches():
    (empty,), rows = corrupt([torch.rand(0, 3)], epsilon=5)
    assert (empty.shape, rows.shape) == ((0, 3), (0, 1))
    (one, two), rows = corrupt([torch.zeros(1, 3), torch.zeros(1)], epsilon=5, share=1.0)
    assert one.all()
    assert two.all()
    assert rows.tolist() == [[True, True]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "blur"}, "kind must be 'gaussian' or 'salt_and_pepper'; got 'blur'"),
        ({"epsilon": -1}, "epsilon must be finite and >= 0; got -1"),
        ({"epsilon": float("nan")}, "epsilon must be finite and >= 0; got nan"),
        ({"kind": KINDS[1], "epsilon": 101}, "epsilon must be in 0..100, per cent; got 101"),
        ({"share": 1.5}, "share must be in 0..1; got 1.5"),
        ({"density": -0.1}, "density must be in 0..1; got -0.1"),
        ({"modalities": []}, "modalities must be a list of tensors.*got list"),
        ({"modalities": torch.rand(3, 2)}, "modalities must be a list of tensors.*got Tensor"),
        ({"modalities": [torch.zeros(3).int()]}, "modality 0 must be .* got torch.int32"),
        ({"modalities": [torch.zeros(3), None]}, "modality 1 must be .* got NoneType"),
        ({"modalities": [torch.zeros(3), torch.zeros(2)]}, r"modality 1 must .* \[2\] and \[3\]"),
        ({"unit": [1.0]}, r"wanted one unit, or one per modality, 2; got \[1.0\]"),
        ({"black": (1.0,) * 3}, "wanted one black, or one per modality, 2"),
    ],
)
def test_bad_input(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        corrupt(**{"modalities": [torch.rand(3), torch.rand(3)], "epsilon": 5, **given})
