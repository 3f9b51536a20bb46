"""Usage: how often the branches of a fusion ran, counted on the device over many batches."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .routing import Routing


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
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._samples = 0
        self._counts: Tensor | None = None  # on the device
        self._known_counts: tuple[int, ...] = ()  # of dense batches: on the host
        self._executed: float | None = 0.0
        self._expected: Tensor | float | None = 0.0

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
        if size == 0:
            return
        if counts is None:
            pairs = zip(self._known_counts, routing.counts, strict=True)
            self._known_counts = tuple(before + count for before, count in pairs)
        else:
            self._counts = counts.clone() if self._counts is None else self._counts + counts
        self._samples += size
        executed, expected = routing.executed_cost, routing.expected_cost
        known = executed is not None and self._executed is not None
        self._executed = self._executed + executed * size if known else None  # type: ignore[operator]
        known = expected is not None and self._expected is not None
        self._expected = self._expected + expected.detach().double() * size if known else None  # type: ignore[operator,union-attr]

    def read(self) -> Report:
        """The counts so far; waits for the device."""
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
