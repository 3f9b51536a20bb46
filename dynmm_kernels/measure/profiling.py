"""Where the time of a user's own fusion goes, and what it would take otherwise.

The parts are measured by themselves: the gate and the branches on several numbers of rows; routing
and blending in the same fusion with branches that cost nothing. Their sum, a `Forecast`, is then
held against the fusion itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean, median
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile

from ..nn.arguments import Arguments
from ..nn.branch import Branch
from ..nn.decision import Decision
from ..nn.routed.fusion import RoutedFusion
from .forecast import Curve, Forecast
from .planned import Free, PlannedGate, answers, planned_rows, twin
from .timing import QUICK, Contestant, Effort, interleave, middle
from .waits import waits
from .work import Call, alone, batch_of, part, whole

PREFIX = "dynmm_kernels::"
PHASES = ("gate", "route", "gather", "branch", "combine", "backward")
PROFILED = 5  # calls
LEAST = 8  # rows up to which branches are measured, whatever the batch

Calls = dict[str, Call]


class SharesError(ValueError):
    """Shares that do not fit the branches."""


@dataclass(frozen=True)
class Check:
    """The fusion itself against its forecast, in seconds."""

    execution: str
    shares: tuple[float, ...]
    measured: float
    predicted: float
    spread: float = 0.0
    """Half of what the middle half of the rounds differs by, as a part of `measured`."""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Profile:
    """What was found of a fusion, in eval or in training.

    Attributes:
        batch: N.
        branches: their names.
        shares: of the samples that take each branch.
        several: whether a sample takes as many branches as it likes.
        learns: the gradient of the gate that was recorded; None: there was none.
        decided: whether the gate gave the shares.
        phases: seconds of a routed call, under a profiler, which costs time, too.
        waits: how often the host reads from the device in a routed call.
        forecast: of the parts.
        checks: routed with these and with other shares, and masked.
        rounds: of the timing.
    """

    training: bool
    batch: int
    branches: tuple[str, ...]
    shares: tuple[float, ...]
    several: bool
    learns: str | None
    decided: bool
    phases: dict[str, float]
    waits: int
    forecast: Forecast
    checks: tuple[Check, ...]
    rounds: int


def profile_fusion(
    fusion: RoutedFusion,
    inputs: tuple[Any, ...],
    shares: Sequence[float] | None = None,
    training: bool = False,
    effort: Effort = QUICK,
    advance: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measures; parameters, gradients, buffers and random numbers are left as they were.

    Args:
        inputs: of the fusion, as it is called; tensors, `Shared` ones too, no `Lazy` ones.
        shares: of the samples that take each branch; None: as the gate decides.
        training: forward and backward in training mode, else forward in eval mode.

    Raises:
        SharesError: shares that do not fit the fusion.
    """
    batch = batch_of(inputs)
    with _in_mode(fusion, training), fusion._undone(batch.tensors()):
        return _Bench(fusion, batch, shares, training).run(effort, advance)


class _Bench:
    def __init__(
        self,
        fusion: RoutedFusion,
        batch: Arguments,
        shares: Sequence[float] | None,
        training: bool,
    ) -> None:
        assert batch.num_rows is not None
        assert batch.device is not None
        self.device = batch.device
        self.fusion, self.batch, self.training = fusion, batch, training
        self.size = batch.num_rows
        self.gate: Branch = fusion.gate
        self.branches: list[Branch] = fusion.branches.all()
        self.names = [str(branch.name) for branch in self.branches]
        with torch.set_grad_enabled(training):
            routing = twin(fusion, "routed")(*batch.selected, return_routing=True)[1]
        self.decision: Decision = routing.decision
        self.several = fusion.select == "multi_hot"
        self.decided = shares is None
        self.shares = tuple(routing.fractions if shares is None else shares)
        _check_shares(self.shares, self.names, fusion.select)
        self.coupled = {
            name
            for name, branch in zip(self.names, self.branches, strict=True)
            if branch.couples_samples() and fusion.batch_norm == "masked"
        }

    def run(self, effort: Effort, advance: Callable[[str], None]) -> Profile:
        settings = [("routed", self.shares), ("routed", self._other()), ("masked", self.shares)]
        itself = [self._fusion(execution, shares) for execution, shares in settings]
        phases, waited = self._phases(itself[0]), waits(itself[0])
        contestants: dict[str, Contestant] = {f"itself {i}": c for i, c in enumerate(itself)}
        contestants |= self._parts()
        seconds = interleave(
            contestants,
            effort,
            str(self.device),
            lambda: advance("training" if self.training else "eval"),
        )
        forecast = self._forecast(seconds, median)
        rounds = [self._forecast(seconds, itemgetter(i)) for i in range(len(seconds["itself 0"]))]
        checks = []
        for i, (execution, shares) in enumerate(settings):
            # Sums round by round: long calls are interrupted more often than their parts.
            predicted = fmean(middle([_of(f, execution, self.size, shares) for f in rounds]))
            its = middle(seconds[f"itself {i}"])
            measured = fmean(its)
            spread = (its[-1] - its[0]) / 2 / measured
            checks.append(Check(execution, shares, measured, predicted, spread))
        return Profile(
            self.training,
            self.size,
            tuple(self.names),
            self.shares,
            self.several,
            self.decision.grad,
            self.decided,
            phases,
            waited,
            forecast,
            tuple(checks),
            len(rounds),
        )

    def _other(self) -> tuple[float, ...]:
        """Other shares, to hold the forecast against."""
        turned = (*self.shares[1:], self.shares[0])
        if self.several or max(abs(a - b) for a, b in zip(turned, self.shares, strict=True)) < 0.1:
            # Half of the samples change to the first branch, or leave the others.
            halves = [share / 2 for share in self.shares]
            halves[0] = min(1.0, sum(self.shares) - sum(halves[1:]))
            if self.several or abs(sum(halves) - sum(self.shares)) < 1e-6:
                return tuple(halves)
        return turned

    def _fusion(self, execution: str, shares: Sequence[float]) -> Call:
        """The fusion itself, its gate asked but overruled."""
        chosen = planned_rows(shares, self.size, self.several).to(self.device)
        gate = PlannedGate(self.gate.module, answers(self.fusion, chosen))
        return whole(twin(self.fusion, execution, gate), self.batch, self.training)

    def _parts(self) -> dict[str, Contestant]:
        contestants: dict[str, Contestant] = {}
        for n in self._sizes():
            group = self._alone(n)
            # By turns, as in the fusion, each finds the caches as the others left them. A clock
            # in between would hold up a GPU.
            contestants |= {f"parts {n}": group} if self.device.type == "cpu" else group
        with torch.no_grad():
            most = self._whole_sizes()[-1]
            self.outputs = [part(branch, self.batch, most)() for branch in self.branches]
        for n in self._whole_sizes():
            for execution in ("routed", "masked"):
                contestants |= self._for_nothing(execution, n)
        return contestants

    def _alone(self, rows: int) -> Calls:
        """The gate and the branches, each by itself."""
        training, batch = self.training, self.batch
        learns = training and self.decision.grad is not None
        calls = {f"gate {rows}": alone([part(self.gate, batch, rows)], learns)}
        for name, branch in zip(self.names, self.branches, strict=True):
            if self._reruns(branch):
                rest = part(branch, batch, rows, rest=True)
                calls[f"rest {name} {rows}"] = alone([rest], training)
            calls[f"branch {name} {rows}"] = alone([part(branch, batch, rows)], training)
        return calls

    def _sizes(self) -> list[int]:
        most = max(self.size, LEAST)
        least = 2 if any(b.couples_samples() for b in (self.gate, *self.branches)) else 1
        return sorted({max(least, most * part // 16) for part in (0, 1, 4, 8, 16)} | {self.size})

    def _whole_sizes(self) -> list[int]:
        return sorted({max(1, self.size // 4), max(len(self.names), self.size)})

    def _reruns(self, branch: Branch) -> bool:
        return self.decision.exact and branch.name not in self.coupled

    def _for_nothing(self, execution: str, rows: int) -> Calls:
        """The fusion with a gate and branches that cost nothing, and these alone."""
        fusion = self.fusion
        batch = batch_of(self._resized(rows))
        chosen = planned_rows(self.shares, rows, self.several)
        for b in range(min(rows, len(self.names))):  # everybody takes part
            if not chosen[:, b].any():
                chosen[b] = torch.arange(len(self.names)) == b
        chosen = chosen.to(self.device)
        outputs = zip(self.branches, self.outputs, strict=True)
        free = [Free(branch, batch, output) for branch, output in outputs]
        gate = Free(self.gate, batch, answers(fusion, chosen))
        other = twin(fusion, execution, gate, free)
        parts = [part(other.gate, batch, rows)]
        for b, branch in enumerate(other.branches.all()):
            if execution == "masked" or branch.name in self.coupled:
                parts.append(part(branch, batch, rows))
                continue
            own = chosen[:, b]
            if own.any():
                parts.append(part(branch, batch, own))
            if self._reruns(branch) and not own.all():
                parts.append(part(branch, batch, ~own, rest=True))
        return {
            f"{execution} free {rows}": whole(other, batch, self.training),
            f"{execution} bare {rows}": alone(parts, self.training),
        }

    def _resized(self, rows: int) -> tuple[Any, ...]:
        return batch_of(self.batch.selected, rows).selected

    def _forecast(
        self, seconds: Mapping[str, list[float]], pick: Callable[[list[float]], float]
    ) -> Forecast:
        """Of what `pick` takes from the rounds of a call."""

        def curve(name: str) -> Curve:
            return Curve(tuple((n, pick(seconds[f"{name} {n}"])) for n in self._sizes()))

        def added(execution: str) -> Curve:
            points = []
            for n in self._whole_sizes():
                free, bare = (pick(seconds[f"{execution} {kind} {n}"]) for kind in ("free", "bare"))
                points.append((n, max(0.0, free - bare)))
            return Curve(tuple(points))

        return Forecast(
            curve("gate"),
            {name: curve(f"branch {name}") for name in self.names},
            added("routed"),
            added("masked"),
            {str(b.name): curve(f"rest {b.name}") for b in self.branches if self._reruns(b)},
            frozenset(self.coupled),
        )

    def _phases(self, call: Call) -> dict[str, float]:
        """Medians over calls; what a phase of that name took in all."""
        call()
        on_device = self.device.type == "cuda"
        found = []
        for _ in range(PROFILED):
            # Not torch.profiler, which loads what makes small calls slower from then on.
            with profile(use_device="cuda" if on_device else None) as recorded:
                call()
            total: Counter[str] = Counter()
            for event in recorded.function_events:
                name = event.name.removeprefix(PREFIX)
                if event.name.startswith(PREFIX) and name.startswith(PHASES):
                    spent = event.device_time_total if on_device else event.cpu_time_total
                    total[name] += spent / 1e6
            found.append(total)
        names = [name for name in found[0] if name.split(".")[0] in _named(found[0])]
        return {name: median(total[name] for total in found) for name in names}


def _of(forecast: Forecast, execution: str, rows: int, shares: Sequence[float]) -> float:
    return forecast.routed(rows, shares) if execution == "routed" else forecast.masked(rows)


def _named(found: Mapping[str, float]) -> set[str]:
    """Names of phases, without the ops inside of them."""
    ops = ("route_argmax", "gather_rows", "combine_rows")
    return {name for name in found if not name.startswith(ops)}


def _check_shares(shares: Sequence[float], names: Sequence[str], select: int | str) -> None:
    wanted = f"{len(names)} numbers in 0..1, for {', '.join(names)}"
    total = sum(shares)
    fits = len(shares) == len(names) and all(0 <= share <= 1 for share in shares)
    if select != "multi_hot":
        wanted += f", with the sum {select}"
        fits = fits and abs(total - float(select)) < 0.01
    if not fits:
        raise SharesError(f"shares must be {wanted}; got {', '.join(f'{s:g}' for s in shares)}")


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """In training what trains already is left alone: a BatchNorm in eval mode stays there."""
    before = {part: part.training for part in module.modules()}
    if not (training and module.training):
        module.train(training)
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode
