"""Runs test_triton.py in a process where Triton interprets its kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_under_the_interpreter(proved):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_triton.py"]
    result = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    summary = result.stdout.splitlines()[-1]
    assert "skipped" not in summary
    proved(f"triton under the interpreter: {summary.strip('= ')}")
