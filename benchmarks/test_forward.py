"""Inference: eval mode, no graph."""

import pytest

from benchmarks.contest import FORWARD_ROWS
from benchmarks.timing import replay

ROWS = tuple(FORWARD_ROWS)
TRAINING = False


@pytest.mark.benchmark(timer=replay.now)
def test_forward(report, contest, row):
    report()
