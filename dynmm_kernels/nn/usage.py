"""Usage: how often the branches of a fusion ran, counted on the device over many batches."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from torch import Tensor

from .routing import DepthRouting, Routing


class Report(NamedTuple):
    """What was counted since the last reset.

    Attributes:
        samples: how many samples.
        counts: how many of them took each branch; for a depth, how many had it.
        fractions: `counts` as shares of the samples.
        executed_cost: cost per sample of what ran, gates included; None without costs.
        expected_cost: mean over samples of probs . costs and the gate; None without either.
    """

    samples: int
    counts: tuple[int, ...]
    fractions: tuple[float, ...]
    executed_cost: float | None
    expected_cost: float | None


class Usage:
    """Counters that wait for the device only when they are read.

        usage = Usage()
        for batch in loader:
            output, routing = fusion(batch, return_routing=True)
            usage.add(routing)
        print(usage.read().fractions)

    They take the place of the weight lists and `cal_flop` of DynMM's code.

    `read` warns where a gate chose a branch for none of at least `window` samples, which is how a
    gate collapses; the next window starts there. Only what a gate chose counts: no forced choice,
    no dense execution, and no chain, in which a static cell is a depth that nobody can have.

    Args:
        window: samples; None: no warning.

    Attributes:
        replays: calls of branches that were replayed, and that ran eagerly although the fusion was
            captured.

    Raises:
        ValueError: a window that is not a positive integer.
    """

    def __init__(self, window: int | None = 1000) -> None:
        if window is not None and (type(window) is not int or window < 1):
            raise ValueError(
                f"Usage: window must be a positive number of samples, or None; got {window!r}"
            )
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._samples = 0
        self._counts: Tensor | None = None  # on the device
        self._known_counts: tuple[int, ...] = ()  # of dense batches: on the host
        self._executed: float | None = 0.0
        self._expected: Tensor | float | None = 0.0
        self.replays = (0, 0)
        self._start_window()

    def _start_window(self) -> None:
        self._chosen_by_gates: Tensor | None = None  # on the device
        self._samples_in_window = 0

    def add(self, routing: Routing) -> None:
        """Counts one batch; no synchronisation.

        Raises:
            ValueError: another number of branches than before.
        """
        size, counts = routing.num_rows, routing.device_counts
        num_branches = len(routing.rows_run)
        if self._known_counts and len(self._known_counts) != num_branches:
            raise ValueError(
                f"Usage: wanted a routing over {len(self._known_counts)} branches, as before; got "
                f"{num_branches}; use one Usage per fusion"
            )
        self._known_counts = self._known_counts or (0,) * num_branches
        if routing.replays is not None:
            hits, misses = self.replays
            self.replays = hits + routing.replays[0], misses + routing.replays[1]
        if size == 0:
            return
        if counts is None:
            pairs = zip(self._known_counts, routing.counts, strict=True)
            self._known_counts = tuple(before + count for before, count in pairs)
        else:
            self._counts = _sum(self._counts, counts)
            if routing.probs is not None:
                self._choices = "depth" if isinstance(routing, DepthRouting) else "branch"
                self._chosen_by_gates = _sum(self._chosen_by_gates, counts)
                self._samples_in_window += size
        self._samples += size
        executed, expected = routing.executed_cost, routing.expected_cost
        known = executed is not None and self._executed is not None
        self._executed = self._executed + executed * size if known else None  # type: ignore[operator]
        known = expected is not None and self._expected is not None
        self._expected = self._expected + expected.detach().double() * size if known else None  # type: ignore[operator,union-attr]

    def read(self) -> Report:
        """The counts so far; waits for the device. Warns of branches that no sample chose."""
        self._warn_of_collapse()
        counts = self._known_counts
        if self._counts is not None:
            pairs = zip(counts, self._counts.tolist(), strict=True)
            counts = tuple(known + counted for known, counted in pairs)
        samples = self._samples
        expected = None if self._expected is None else float(self._expected)
        return Report(
            samples,
            counts,
            tuple(count / max(1, samples) for count in counts),
            None if self._executed is None or not samples else self._executed / samples,
            None if expected is None or not samples else expected / samples,
        )

    def _warn_of_collapse(self) -> None:
        size, counts = self._samples_in_window, self._chosen_by_gates
        if self.window is None or counts is None or size < self.window:
            return
        self._start_window()
        unused = [str(b) for b, count in enumerate(counts.tolist()) if not count]
        if unused:
            warnings.warn(
                f"Usage: the gate chose {self._choices} {', '.join(unused)} for none of {size} "
                "samples; to keep every one in use, add balance_loss or entropy_loss to the loss, "
                "train with noise='gumbel', or begin with random choices (choice='random', or "
                "depth=); Usage(window=None) does not warn",
                stacklevel=3,
            )


def _sum(before: Tensor | None, counts: Tensor) -> Tensor:
    return counts.clone() if before is None else before + counts
