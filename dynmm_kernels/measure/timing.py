"""Interleaved timing: contestants take turns, so that their ratios mean something.

On a shared machine the same call takes 1.0 s now and 1.4 s a minute later, so two rows timed one
after the other have no meaningful ratio. Here every contestant runs once per round, in an order
that rotates, and medians are taken over rounds.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Effort:
    seconds: float
    """How long the rounds of one group may take in all."""
    rounds: tuple[int, int]
    """At least and at most."""
    sample: float = 5e-4
    """A call shorter than this is repeated inside one round."""

    def at_least(self, rounds: int) -> Effort:
        return replace(self, rounds=(rounds, max(rounds, self.rounds[1])))


QUICK = Effort(seconds=2.0, rounds=(3, 30))
FULL = Effort(seconds=30.0, rounds=(9, 100))
ONCE = Effort(seconds=0.0, rounds=(1, 1), sample=0.0)


def synced_clock(device: str) -> Callable[[], float]:
    """A clock that waits for the device."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    effort: Effort,
    device: str = "cpu",
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of every contestant, one entry per round."""
    now = synced_clock(device)

    def timed(run: Callable[[], object], calls: int) -> float:
        start = now()
        for _ in range(calls):
            run()
        return (now() - start) / calls

    def warmed_up(run: Callable[[], object]) -> float:
        first = timed(run, 1)
        return first if first > 0.1 else min(first, timed(run, 1))

    warm = {name: warmed_up(run) for name, run in contestants.items()}
    calls = {name: max(1, math.ceil(effort.sample / warm[name])) for name in contestants}
    one_round = sum(warm[name] * calls[name] for name in contestants)
    fewest, most = effort.rounds
    rounds = min(max(int(effort.seconds / one_round), fewest), most)

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(timed(contestants[name], calls[name]))
            gc.collect(0)
            after_round()
    finally:
        if collecting:
            gc.enable()
    return seconds
