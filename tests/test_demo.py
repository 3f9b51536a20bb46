"""The demo, short: what its table says must hold whatever the training came to."""

import pytest

from dynmm_kernels import demo


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
