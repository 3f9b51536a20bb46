"""Learn then Test (Angelopoulos et al. 2021) for the thresholds of a cascade.

One half of the rows puts the exits of all stages into one order, from the safest to the boldest.
The other half walks along it for as long as a binomial test rejects that the risk is above the
target (fixed-sequence testing), which needs no risk that grows along the way.
"""

from __future__ import annotations

import math
from importlib import import_module
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

GRID = 500  # candidates at most; where there are more, evenly spaced ones


def halves(rows: int) -> tuple[Array, Array]:
    """Two disjoint sets of row numbers, drawn with a fixed seed: to learn from, and to test on."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).numpy()
    return order[: rows // 2], order[rows // 2 :]


def family(scores: Array, harmless: Array) -> tuple[Array, Array]:
    """Ways to leave, from the safest to the boldest.

    Args:
        scores: floating [n, S - 1].
        harmless: bool [n, S - 1]: leaving there is no loss.

    Returns:
        Probabilities [L], falling from inf, and thresholds [L, S - 1]: at candidate l a stage lets
        go exactly the rows from the lowest score on whose (probability, rank) is at least that of
        l. Rank among the scores of a stage tells apart what isotonic regression leaves equal.
    """
    isotonic_regression = _from_library("sklearn.isotonic", "isotonic_regression")
    entries = []
    for stage in range(scores.shape[1]):
        score, place, size = np.unique(scores[:, stage], return_inverse=True, return_counts=True)
        share = np.bincount(place, harmless[:, stage]) / size
        probability = isotonic_regression(share, sample_weight=size)
        entries.append(np.stack([probability, size.cumsum(), np.full(len(score), stage), score]))
    table = np.concatenate(entries, axis=1)
    order = np.lexsort((table[1], table[0]))[::-1]
    probability, rank, stages, score = table[:, order]
    # Every entry lowers the threshold of its stage; entries that tie do so together.
    thresholds = np.full((len(score) + 1, scores.shape[1]), np.inf)
    thresholds[np.arange(len(score)) + 1, stages.astype(np.int64)] = score
    thresholds = np.minimum.accumulate(thresholds)
    changes = (np.diff(probability) != 0) | (np.diff(rank) != 0)
    kept = np.flatnonzero(np.concatenate([[True], changes, [True]]))
    kept = kept[np.linspace(0, len(kept) - 1, min(len(kept), GRID)).round().astype(np.int64)]
    return np.insert(probability, 0, np.inf)[kept], thresholds[kept]


def leave(scores: Array, thresholds: Array) -> Array:
    """int64 [n]: the stage after which each row leaves, the first whose threshold it reaches."""
    always = np.ones((len(scores), 1), dtype=bool)
    return np.concatenate([scores >= thresholds, always], axis=1).argmax(1)


def fixed_sequence(losses: Array, target: float, delta: float) -> int:
    """How many candidates pass, in their order, before the first does not.

    A candidate with k losses in n rows passes when P(Binomial(n, target) <= k) <= delta.

    Args:
        losses: bool [n, L], of every row at every candidate.
    """
    binom = _from_library("scipy.stats", "binom")
    passes = binom.cdf(losses.sum(0), len(losses), target) <= delta
    return len(passes) if passes.all() else int(passes.argmin())


def rows_needed(target: float, delta: float) -> int:
    """The fewest rows held out with which a candidate without a loss passes."""
    binom = _from_library("scipy.stats", "binom")
    about = max(1, math.floor(math.log(delta) / math.log1p(-target)))
    return next(rows for rows in count(about) if binom.cdf(0, rows, target) <= delta)


def upper_bounds(failures: Array, n: int, delta: float) -> Array:
    """Of the risk behind so many failures in n rows (Clopper and Pearson, one-sided)."""
    beta = _from_library("scipy.stats", "beta")
    return np.where(
        failures == n, 1.0, beta.ppf(1 - delta, failures + 1, np.maximum(1, n - failures))
    )


def _from_library(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise ImportError(
            f"calibrate needs scikit-learn and scipy ({error}): pip install scikit-learn"
        ) from error
