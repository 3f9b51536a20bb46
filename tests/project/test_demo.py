"""Commands load what they use; what the demo's table says holds whatever training came to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynmm_kernels import __main__ as command
from dynmm_kernels.demo import bench, qmf, qmf_report, report, sweep

LOADED = """
import sys
from dynmm_kernels.__main__ import main
try:
    main(sys.argv[1:])
finally:
    rooms = ("matplotlib", "sklearn", "rich", "dynmm_kernels.demo", "dynmm_kernels.cli.check")
    print([room for room in rooms if room in sys.modules])
"""


@pytest.mark.parametrize("words", [["info"], ["plot", "--help"]])
def test_commands_load_what_they_use(words):
    """Neither what draws and trains, nor each other."""
    run = subprocess.run(
        [sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"


def test_plot(tmp_path, capsys):
    """Two gate probabilities make a curve; what was not compared with masked is left out."""
    pytest.importorskip("matplotlib")
    about = {"workload": "imdb", "kind": "forward", "n": 4, "device": "cpu", "dtype": "float32"}
    about |= {"threads": 1, "macs_gate": 1, "macs_branches": [1, 20], "ceiling": 3.0}
    measured = [("routed", 3, 4.0), ("routed", 1, 0.8), ("static_e2", 1, 1.2), ("masked", 1, None)]
    benchmarks = [
        {
            "extra_info": {
                **about,
                "row": row,
                "p": 1 - cheap / 4,
                "counts": [cheap, 4 - cheap],
                "realised": speedup,
            },
            "stats": {"median": 0.002},
        }
        for row, cheap, speedup in measured
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"benchmarks": benchmarks}))
    assert command.main(["plot", str(results)]) == 0
    png, svg, table = (Path(file) for file in capsys.readouterr().out.split())
    assert min(png.stat().st_size, svg.stat().st_size) > 10_000
    assert table.read_text().splitlines() == [
        "workload,kind,row,n,p,active,speedup,ceiling,median_ms",
        "imdb,forward,routed,4,0.25,0.25,4.0,3.0,2.0",
        "imdb,forward,routed,4,0.75,0.75,0.8,3.0,2.0",
        "imdb,forward,static_e2,4,0.75,0.75,1.2,3.0,2.0",
    ]


def test_demo_command(tmp_path, capsys):
    figure = str(tmp_path / "demo.png")
    assert command.main(["demo", "--epochs=1", "--rounds=1", "--json", "--figure", figure]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["mode"] for row in rows] == list(bench.Bench.MODES)


def test_report():
    found, _ = bench.experiment(epochs=2, rounds=1)
    masked, routed = found.row("masked"), found.row("routed")
    assert found.parity < 1e-5
    assert routed.accuracy == masked.accuracy
    assert routed.shares == masked.shares
    for row in found.rows:
        assert sum(row.shares) == pytest.approx(1)
        assert row.ceiling == pytest.approx(masked.macs / row.macs)
    assert routed.macs <= masked.macs
    assert found.row("static E1").macs < found.row("static E2").macs
    assert "routed" in report.table(found)


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    found, _ = bench.experiment(epochs=1, rounds=1)
    assert report.draw(found, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_sweep(tmp_path):
    points = sweep.sweep(epochs=2, seeds=[0], cost_weights=(0.01, 1.0), rounds=1)
    assert [p.row.mode for p in points] == [
        "static E1",
        "static E2",
        *["routed", "routed", "dense"] * 2,
    ]
    cheap, dear = (sweep.pairs(points)[i] for i in (1, 0))
    for masked, routed in (cheap, dear):
        assert (masked.trained, routed.trained) == ("masked", "routed")
        assert routed.row.accuracy == pytest.approx(masked.row.accuracy, abs=1)
        assert routed.row.macs == pytest.approx(masked.row.macs, rel=0.05)
    assert cheap[1].row.macs < dear[1].row.macs
    assert "2 pairs" in sweep.table(points)
    if sweep.draw(points, tmp_path / "sweep.png"):
        assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_qmf(tmp_path):
    """Every method under every noise, and what the cascade saves; whatever training came to."""
    pytest.importorskip("sklearn")
    found = qmf.experiment(epochs=1, seeds=1, rounds=1)
    assert [row.method for row in found.rows] == [
        *qmf.LATE,
        "DynMM gate",
        "QMF cascade, calibrated",
    ]
    late, *_, cascade = found.rows
    for row in found.rows:
        assert [*row.accuracy] == [*qmf_report.NOISES]
        assert all(0 <= score <= 100 for score in row.accuracy.values())
        assert row.time_ms > 0
    assert cascade.macs <= late.macs
    text = qmf_report.table(found)
    assert found.guarantee in text
    assert all(noise in text for noise in qmf_report.NOISES)
    pytest.importorskip("matplotlib")
    assert qmf_report.draw(found, tmp_path / "qmf.png")
    assert (tmp_path / "qmf.png").stat().st_size > 10_000
