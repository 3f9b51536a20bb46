"""One training step without its optimizer: zero_grad, forward, loss, backward.

Batch norm (E2 of imdb) is frozen, dropout is the paper's.
"""

import pytest

from benchmarks.contest import TRAINING_ROWS
from benchmarks.timing import replay

ROWS = tuple(TRAINING_ROWS)
TRAINING = True


@pytest.mark.benchmark(timer=replay.now)
def test_training(report, contest, row):
    report()
