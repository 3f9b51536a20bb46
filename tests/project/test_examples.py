"""The programs in examples/ run by themselves, and what they print is right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dynmm_kernels
from dynmm_kernels.ops.backends import compiled

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# Every warning is an error but this one, and only where nothing was compiled.
SLOWER = "dynmm_kernels runs on its PyTorch reference"


def printed(name: str) -> list[str]:
    """The lines that the program prints, with the package that is tested."""
    package = str(Path(dynmm_kernels.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    tolerated = ["-W", f"ignore:{SLOWER}:UserWarning"] if compiled.reason else []
    run = subprocess.run(
        [sys.executable, "-W", "error", *tolerated, EXAMPLES / f"{name}.py"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    return run.stdout.splitlines()


def numbers(cells: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in cells]


def test_cascade():
    """Who lets samples go earlier pays less; what calibration promised holds."""
    guarantee, heading, *lines = printed("cascade")
    assert guarantee.startswith("With probability at least 0.9")
    assert heading.split()[:3] == ["threshold", "accuracy", "cost"]
    rows = {row[0]: numbers(row[1:3]) for row in map(str.split, lines)}
    (all_right, most), (_, less), (calibrated, least) = (
        rows[threshold] for threshold in ("inf", "0.9", "calibrated")
    )
    assert most / 2 > less > least
    assert all_right > 0.95
    assert calibrated > all_right - 0.08
    assert "strip 0%, border 0%, image 100%" in lines[0]


def test_missing_modality():
    """Both fusions run each encoder on the samples that have its modality."""
    energy, *_ = lines = printed("missing_modality")
    assert energy.startswith("EnergyFusion")
    for line in (lines[1], lines[3]):
        assert "rows of 6: text 4, image 2, audio 2;" in line
        assert float(line.split()[-1]) < 1e-5


def test_qmf_training():
    """Both trainings work, and noise hurts."""
    heading, *lines = printed("qmf_training")
    assert heading.startswith("ranking loss  noise")
    rows = [numbers(line.split()) for line in lines]
    assert [weight for weight, *_ in rows] == [0.0, 1.0]
    for _, clean, *noisy in rows:
        assert clean > 0.9
        assert clean > noisy[0] > noisy[1] > 0.5


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_short_and_tested(file):
    assert len(file.read_text().splitlines()) < 80
    assert f"test_{file.stem}" in globals()
