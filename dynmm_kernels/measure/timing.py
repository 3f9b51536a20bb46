"""Interleaved timing: contestants take turns, so that their ratios mean something.

On a shared machine the same call takes 1.0 s now and 1.4 s a minute later, so two rows timed one
after the other have no meaningful ratio. Here every contestant runs once per round, in an order
that rotates, and medians are taken over rounds.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

LONG = 0.1  # seconds, of a call that need not be warmed up


@dataclass(frozen=True)
class Effort:
    seconds: float
    """How long the rounds of one group may take in all."""
    rounds: tuple[int, int]
    """At least and at most."""
    sample: float = 5e-4
    """A call shorter than this is repeated inside one round."""
    warm: bool = False
    """Such a call is repeated as often before, untimed, and others up to LONG once: those before
    have left the caches full of something else."""

    def at_least(self, rounds: int) -> Effort:
        return replace(self, rounds=(rounds, max(rounds, self.rounds[1])))


QUICK = Effort(seconds=2.0, rounds=(3, 30))
FULL = Effort(seconds=30.0, rounds=(9, 100))
ONCE = Effort(seconds=0.0, rounds=(1, 1), sample=0.0)


def middle(rounds: Sequence[float]) -> list[float]:
    """The middle half, sorted. Its mean is steady, and those of parts add up, as medians do not."""
    quarter = len(rounds) // 4
    return sorted(rounds)[quarter : len(rounds) - quarter]


Contestant = Callable[[], object] | Mapping[str, Callable[[], object]]


def synced_clock(device: str) -> Callable[[], float]:
    """A clock that waits for the device."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def interleave(
    contestants: Mapping[str, Contestant],
    effort: Effort,
    device: str = "cpu",
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of every contestant, one entry per round.

    Those of a group run one after the other within each call of the group, and are timed each.
    """
    now = synced_clock(device)

    def timed(group: Mapping[str, Callable[[], object]], calls: int) -> dict[str, float]:
        if len(group) == 1:  # without a clock in between
            ((name, run),) = group.items()
            start = now()
            for _ in range(calls):
                run()
            return {name: (now() - start) / calls}
        spent = dict.fromkeys(group, 0.0)
        for _ in range(calls):
            for name, run in group.items():
                start = now()
                run()
                spent[name] += now() - start
        return {name: total / calls for name, total in spent.items()}

    def warmed_up(group: Mapping[str, Callable[[], object]]) -> float:
        first = sum(timed(group, 1).values())
        return first if first > LONG else min(first, sum(timed(group, 1).values()))

    groups = {
        name: {name: contestant} if callable(contestant) else contestant
        for name, contestant in contestants.items()
    }
    warm = {name: warmed_up(group) for name, group in groups.items()}
    calls = {name: max(1, math.ceil(effort.sample / warm[name])) for name in contestants}
    leads = {
        name: max(1, calls[name] - 1) if effort.warm and warm[name] < LONG else 0
        for name in contestants
    }
    one_round = sum(warm[name] * (calls[name] + leads[name]) for name in contestants)
    fewest, most = effort.rounds
    rounds = min(max(int(effort.seconds / one_round), fewest), most)

    seconds: dict[str, list[float]] = {name: [] for group in groups.values() for name in group}
    names = list(contestants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                if leads[name]:
                    timed(groups[name], leads[name])
                for part, its in timed(groups[name], calls[name]).items():
                    seconds[part].append(its)
            gc.collect(0)
            after_round()
    finally:
        if collecting:
            gc.enable()
    return seconds
