"""Starts test_triton.py with Triton interpreted, which is decided before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynmm_kernels

pytest.importorskip("triton", reason="Triton is not installed")

TESTS = Path(__file__).parent


def test_triton_kernels_interpreted(proved):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("DYNMM_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_triton.py"]
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    report = run.stdout[-4000:]
    assert run.returncode == 0, report + run.stderr[-2000:]
    assert "skipped" not in report, report
    proved(f"Triton kernels interpreted: {report.splitlines()[-1].strip('= ')}")


def test_importing_the_package_does_not_import_triton_kernels():
    """Only the first call of a Triton op does."""
    code = "import sys, dynmm_kernels; print('dynmm_kernels.ops.triton' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=TESTS.parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "False"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which Triton serves")
def test_backend_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = pytest.raises(RuntimeError, match=r"'triton'.*TRITON_INTERPRET=1")
    with refused, dynmm_kernels.backend("triton"):
        pass
