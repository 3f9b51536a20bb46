"""The benchmark of layers that samples skip or leave, in a size that takes no time."""

import pytest
import torch

from benchmarks.layers import Size, depths_of, planned, report
from dynmm_kernels.measure.timing import ONCE

SMALL = Size(rows=4, layers=4, tokens=3, width=12)


def test_report(capsys):
    """Every way agrees with the masked formula, or it would raise."""
    torch.manual_seed(0)
    report(SMALL, ONCE)
    lines = capsys.readouterr().out.splitlines()
    assert sum("ms" in line for line in lines) == 4 + 4 + 3 * (3 + 3)


def test_planned_shares_are_exact():
    assert planned(Size()).float().mean().item() == pytest.approx(0.47, abs=0.01)
    assert depths_of(SMALL, [0.25, 1]).tolist() == [1, 2, 3, 4]
