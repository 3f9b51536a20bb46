"""A workload run in several ways, on the same samples and decisions: checked, then timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..nn.arguments import Arguments
from ..nn.routed.fusion import RoutedFusion
from .planned import PlannedGate, answers, planned_rows, twin
from .timing import QUICK, Effort, interleave
from .work import alone, batch_of, gradients, part, whole
from .workloads import WORKLOADS

EXECUTIONS = ("dense", "masked", "routed", "auto")
TOLERANCE = 1e-3  # of fp32 against fp64, relative to the largest value; TF32 included
LEARNING = 3  # rounds, of auto


@dataclass(frozen=True)
class Setting:
    """What is run: `share` of `batch` samples needs the costly branch."""

    workload: str
    batch: int
    share: float
    training: bool
    device: str = "cpu"

    @property
    def costly(self) -> int:
        return round(self.share * self.batch)


@dataclass(frozen=True)
class Row:
    """One way to run a setting.

    Attributes:
        error: of outputs and gradients against fp64, relative to the largest.
        seconds: a median over rounds; None where the result was wrong.
        speedup: over masked, the median of the rounds' quotients.
        ceiling: the speed-up that counted multiply-accumulates would allow.
        overhead: time over that of gate and branches alone, on rows gathered before.
    """

    execution: str
    error: float
    seconds: float | None = None
    speedup: float | None = None
    ceiling: float | None = None
    overhead: float | None = None


def race(
    setting: Setting,
    executions: Iterable[str] = EXECUTIONS,
    effort: Effort = QUICK,
    advance: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """The rows of one setting, masked always among them."""
    workload = WORKLOADS[setting.workload]
    fusion, inputs = workload.make(setting.batch)
    fusion = fusion.to(setting.device).train(setting.training)
    batch = batch_of(tuple(x.to(setting.device) for x in inputs))
    shares = 1 - setting.costly / setting.batch, setting.costly / setting.batch
    chosen = planned_rows(shares, setting.batch).to(setting.device)
    wanted = dict.fromkeys([*executions, "masked"])
    ways = {name: _way(fusion, name, chosen) for name in wanted}
    errors = {name: _error(fusion, way, batch, chosen) for name, way in ways.items()}
    right = {name: way for name, way in ways.items() if errors[name] <= TOLERANCE}
    if "auto" in right:
        right["auto"].calibrate(*batch.selected, rounds=LEARNING)
    calls = {name: whole(way, batch, setting.training) for name, way in right.items()}
    if "routed" in calls:
        calls["bare"] = _bare(fusion, batch, chosen, setting.training)
    for call in calls.values():
        call()
    seconds = interleave(calls, effort, setting.device, lambda: advance(setting.workload))
    ceiling = workload.ceiling(
        setting.costly, setting.batch, fusion.gate_grad if setting.training else None
    )
    return [_row(name, errors[name], seconds, ceiling) for name in wanted]


def _row(name: str, error: float, seconds: dict[str, list[float]], ceiling: float) -> Row:
    if name not in seconds:
        return Row(name, error)

    def ratio(slow: str, fast: str) -> float | None:
        if slow not in seconds or fast not in seconds:
            return None
        return median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    sparse = name in ("routed", "auto")
    overhead = ratio(name, "bare") if name == "routed" else None
    limit = ceiling if sparse else None
    return Row(name, error, median(seconds[name]), ratio("masked", name), limit, overhead)


def _way(fusion: RoutedFusion, execution: str, chosen: Tensor) -> RoutedFusion:
    return twin(fusion, execution, PlannedGate(fusion.gate.module, answers(fusion, chosen)))


def _bare(
    fusion: RoutedFusion, batch: Arguments, chosen: Tensor, training: bool
) -> Callable[[], None]:
    """The work that no router can avoid."""
    parts = [part(fusion.gate, batch, len(chosen))]
    for branch, own in zip(fusion.branches.all(), chosen.unbind(1), strict=True):
        if training and not own.all():
            parts.append(part(branch, batch, ~own, rest=True))
        if own.any():
            parts.append(part(branch, batch, own))
    return alone(parts, training)


def _error(fusion: RoutedFusion, way: RoutedFusion, batch: Arguments, chosen: Tensor) -> float:
    """Against plain PyTorch in fp64."""
    exact = copy.deepcopy(fusion).double()
    inputs = tuple(x.double() for x in batch.selected)
    soft = way.execution == "dense"
    planned = _way(exact, "masked", chosen).gate

    def reference() -> Tensor:
        weights = planned(*inputs).softmax(1)
        if not soft:
            weights = chosen.double() + (weights - weights.detach())
        outputs = [branch(*inputs) for branch in exact.branches]
        return sum(weights[:, b : b + 1] * y for b, y in enumerate(outputs))

    with torch.no_grad():
        errors = [_difference([way(*batch.selected)], [reference()])]
    if way.training:
        got = gradients(lambda: way(*batch.selected), [fusion], ())
        errors.append(_difference(got, gradients(reference, [exact], ())))
    return max(errors)


def _difference(got: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Relative to the largest value; one that is missing is zero."""
    pairs = [(g, w) for g, w in zip(got, wanted, strict=True) if g is not None or w is not None]
    zero = torch.zeros(())
    worst = [
        float(((zero if g is None else g) - (zero if w is None else w)).abs().max())
        for g, w in pairs
    ]
    return max(worst) / max(float(w.abs().max()) for _, w in pairs if w is not None)
