"""The demo, short: what its table says must hold whatever the training came to."""

import pytest

from dynmm_kernels import demo, demo_sweep


def test_report():
    report, _ = demo.experiment(epochs=2, rounds=1)
    masked, routed = report.row("masked"), report.row("routed")
    assert report.parity < 1e-5
    assert routed.accuracy == masked.accuracy
    assert routed.shares == masked.shares
    for row in report.rows:
        assert sum(row.shares) == pytest.approx(1)
        assert row.ceiling == pytest.approx(masked.macs / row.macs)
    assert routed.macs <= masked.macs
    assert report.row("static E1").macs < report.row("static E2").macs
    assert "routed" in demo.table(report)


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    report, _ = demo.experiment(epochs=1, rounds=1)
    assert demo.draw(report, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_sweep(tmp_path):
    points = demo_sweep.sweep(epochs=2, seeds=[0], cost_weights=(0.01, 1.0), rounds=1)
    assert [p.row.mode for p in points] == [
        "static E1",
        "static E2",
        *["routed", "routed", "dense"] * 2,
    ]
    cheap, dear = (demo_sweep.pairs(points)[i] for i in (1, 0))
    for masked, routed in (cheap, dear):
        assert (masked.trained, routed.trained) == ("masked", "routed")
        assert routed.row.accuracy == pytest.approx(masked.row.accuracy, abs=1)
        assert routed.row.macs == pytest.approx(masked.row.macs, rel=0.05)
    assert cheap[1].row.macs < dear[1].row.macs
    assert "2 pairs" in demo_sweep.table(points)
    if demo_sweep.draw(points, tmp_path / "sweep.png"):
        assert (tmp_path / "sweep.png").stat().st_size > 10_000
