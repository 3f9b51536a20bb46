"""The two ways to run a cascade: all stages everywhere, or each on the samples still there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional import checks, movement, sorting
from ...functional.plan import RoutingPlan
from ..arguments import Arguments, gather_arguments
from ..branch import Branch
from ..decision import Decision
from ..memory import apart
from ..routed.execution import touch_starved
from ..rules import TOP_ONE
from .fuses import Fuse, fuse_logits
from .scores import Score, measure

DEFINED = "score must not be nan"


class Cascade(NamedTuple):
    """What a `CascadeFusion` consists of."""

    stages: list[Branch]
    score: Score
    thresholds: tuple[float, ...]
    fuse: Fuse


class Outcome(NamedTuple):
    """The output [N, C], where samples left, the rows that each stage ran, the logits of exits."""

    output: Tensor
    decision: Decision
    rows_run: tuple[int, ...]
    exits: tuple[Tensor, ...] | None = None


def run_everywhere(
    cascade: Cascade, batch: Arguments, decision: Decision | None, training: bool
) -> Outcome:
    """All stages on all samples; `decision`: where samples are forced to leave.

    In training nobody leaves early otherwise.
    """
    exits = all_exits(cascade, batch)
    size, last = exits[0].shape[0], len(exits) - 1
    output = exits[-1]
    if decision is None and training:
        choice = torch.full((size,), last, device=output.device)
        plan = sorting.route_counted(choice, [*[0] * last, size])
        decision = Decision(TOP_ONE, choice, plan)
    else:
        decision = _decide(cascade, exits) if decision is None else decision
        assert decision.choice is not None
        for s in reversed(range(last)):
            left = decision.choice.unsqueeze(1) == s
            output = torch.where(left, exits[s], output)
    held = [*exits, *held_by(cascade, batch, cascade.stages)]
    return Outcome(apart(output, held), decision, (size,) * len(exits), tuple(exits))


def all_exits(cascade: Cascade, batch: Arguments) -> list[Tensor]:
    """The fused logits [N, C] after every stage, all of them on all samples."""
    logits: list[Tensor] = []
    first, rows = None, batch.num_rows
    for stage in cascade.stages:
        output = stage.call_whole(batch, batch.num_rows)
        first = check_stage(output, stage, rows, batch.device, first)
        rows = output.shape[0]
        logits.append(output)
    return [fuse_logits(cascade.fuse, logits[: s + 1]) for s in range(len(logits))]


def all_scores(cascade: Cascade, exits: Sequence[Tensor]) -> Tensor:
    """[N, S-1]: how sure each stage but the last is."""
    return torch.stack([measure(cascade.score, logits) for logits in exits[:-1]], 1)


def _decide(cascade: Cascade, exits: Sequence[Tensor]) -> Decision:
    """Each sample leaves after the first stage whose threshold it reaches."""
    scores = all_scores(cascade, exits)
    last = scores.shape[1]
    choice = torch.full((scores.shape[0],), last, device=scores.device)
    undefined = torch.zeros_like(choice, dtype=torch.bool)
    for s in reversed(range(last)):
        own = scores[:, s]
        leaves = own >= cascade.thresholds[s]
        choice = torch.where(leaves, s, choice)
        undefined = own.isnan() | (undefined & ~leaves)
    plan = sorting.route_unless(choice.unsqueeze(1), undefined, last + 1)
    checks.check_faults(scores, plan, "the cascade", wanted=DEFINED)
    return Decision(TOP_ONE, choice, plan)


class Survivors:
    """The samples of a batch that no stage has let go yet."""

    __slots__ = ("batch", "plan", "rows")

    def __init__(self, batch: Arguments) -> None:
        self.batch = batch
        self.rows: Tensor | None = None  # int32, ascending; None: all
        self.plan: RoutingPlan | None = None

    def run(self, stage: Branch) -> Any:
        """What the stage returns for them, having been given nobody else."""
        if self.plan is None:
            return stage.call_whole(self.batch, self.batch.num_rows)
        own = stage.arguments(self.batch)
        return stage.call(gather_arguments(self.plan, [0], [own], [stage.in_place]).pop())

    def keep(self, order: Tensor, num_rows: int) -> None:
        """Only these of them stay."""
        self.rows = order if self.rows is None else self.rows.index_select(0, order)
        self.plan = sorting.subset(self.rows, num_rows)


class Routed:
    """Each stage on the samples that no earlier one let go; there is at least one sample.

    Attributes:
        forced: where samples must leave, if that is decided already.
        so_far: logits of the survivors, of each stage so far that is still to be fused.
        left: fused logits of those who left, by stage.
        choice: int64 [N], the stage that each sample left after, or has come to.
    """

    __slots__ = ("batch", "cascade", "choice", "first", "forced", "left", "live", "ran", "so_far")

    choice: Tensor

    def __init__(self, cascade: Cascade, batch: Arguments, forced: Decision | None) -> None:
        self.cascade = cascade
        self.batch = batch
        self.forced = forced
        self.live = Survivors(batch)
        self.so_far: list[Tensor] = []
        self.left: dict[int, Tensor] = {}
        self.ran: list[int] = []  # rows of each stage
        self.first: Logits | None = None

    def run(self) -> Outcome:
        last = len(self.cascade.stages) - 1
        for s in range(last):
            fused = self._run_stage(s)
            count, plan = self._split(s, fused)
            if count == self.ran[s]:
                self.left[s] = fused
                break
            if count and plan is not None:
                self.left[s] = self._let_go(plan, count, fused)
            if self.forced is None:
                self._move_on(s + 1)
        else:
            self.left[last] = self._run_stage(last)
        return self._report()

    def _run_stage(self, s: int) -> Tensor:
        """The fused logits [n, C] of the survivors."""
        stage, fuse = self.cascade.stages[s], self.cascade.fuse
        wanted = self.ran[-1] - len(self.left.get(s - 1, ())) if s else self.batch.num_rows
        logits = self.live.run(stage)
        self.first = check_stage(logits, stage, wanted, self.batch.device, self.first)
        self.ran.append(logits.shape[0])
        if s == 0 and self.forced is None:
            self.choice = torch.zeros(self.ran[0], dtype=torch.int64, device=logits.device)
        if fuse == "last":
            return logits
        self.so_far.append(logits)
        return fuse_logits(fuse, self.so_far)

    def _split(self, s: int, fused: Tensor) -> tuple[int, RoutingPlan | None]:
        """How many leave, and the plan of two branches: who leaves, who stays."""
        size, rows = self.ran[s], self.live.rows
        if self.forced is not None:
            exit, plan = self.forced.choice, self.forced.plan
            assert exit is not None
            assert plan is not None
            count = plan.counts[s]
            if count in (0, size):
                return count, None
            own = exit if rows is None else exit.index_select(0, rows)
            return count, sorting.route_counted((own > s).long(), (count, size - count))
        scores = measure(self.cascade.score, fused)
        stays = (scores < self.cascade.thresholds[s]).long()
        plan = sorting.route_unless(stays.unsqueeze(1), scores.isnan(), 2)
        checks.check_faults(scores, plan, self.cascade.stages[s].label, rows, DEFINED)
        return plan.counts[0], plan

    def _let_go(self, plan: RoutingPlan, count: int, fused: Tensor) -> Tensor:
        """The fused logits of the first `count` slots; the others go on."""
        kept, size = len(self.so_far), plan.num_rows
        starts, stops = [0, *[count] * kept], [count, *[size] * kept]
        sources = [fused, *self.so_far]
        left, *self.so_far = movement.gather_slots(plan, sources, range(kept + 1), starts, stops)
        self.live.keep(plan.order[count:], self.ran[0])
        return left

    def _move_on(self, s: int) -> None:
        rows = self.live.rows
        if rows is None:
            self.choice.fill_(s)
        else:
            self.choice.index_fill_(0, rows.long(), s)

    def _report(self) -> Outcome:
        stages, left, ran = self.cascade.stages, self.left, len(self.ran)
        decision = self.forced
        if decision is None:
            counts = [len(left.get(s, ())) for s in range(len(stages))]
            plan = sorting.route_counted(self.choice, counts)
            decision = Decision(TOP_ONE, self.choice, plan)
        assert decision.plan is not None
        if len(left) == 1:
            (fused,) = left.values()
            output = apart(fused, held_by(self.cascade, self.batch, stages[:ran]))
        else:
            starts = [decision.plan.starts[s] for s in left]
            output = movement.combine_rows(decision.plan, [*left.values()], starts)
        if ran < len(stages) and torch.is_grad_enabled():
            (output,) = touch_starved([output], stages[ran:], self.batch)
        return Outcome(output, decision, (*self.ran, *[0] * (len(stages) - ran)))


class Logits(NamedTuple):
    """What the first stage returned, and all others must."""

    label: str
    classes: int
    dtype: torch.dtype
    device: torch.device


def check_stage(
    logits: Any,
    stage: Branch,
    rows: int | None,
    device: torch.device | None,
    first: Logits | None,
) -> Logits:
    """What other stages must return: as the `first`, or as this one where it is the first.

    Args:
        rows, device: where the inputs tell.

    Raises:
        ValueError, TypeError: anything but floating [rows, C] on the device, C and dtype as the
            first stage's.
    """
    wanted = f"[{'N' if rows is None else rows}, {first.classes if first else 'C'}]"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{stage.label} must return floating logits {wanted}; got {got}")
    shape, device = logits.shape, first.device if first else device
    if logits.layout is not torch.strided:
        raise TypeError(f"{stage.label} must return strided logits; got {logits.layout}")
    fits = len(shape) == 2 and rows in (None, shape[0]) and (not first or shape[1] == first.classes)
    if not fits or shape[1] == 0:
        like = f", as {first.label} does" if first else ", one row per sample it received"
        raise ValueError(
            f"{stage.label} must return logits of shape {wanted}{like}; got {list(shape)}"
        )
    if device is not None and logits.device != device:
        raise ValueError(
            f"{stage.label} must return logits on {device}, as the inputs are; got {logits.device}"
        )
    if first is None:
        return Logits(stage.label, shape[1], logits.dtype, logits.device)
    if logits.dtype != first.dtype and not torch.is_autocast_enabled(logits.device.type):
        raise TypeError(
            f"{stage.label} returns {logits.dtype}, {first.label} {first.dtype}; stages must agree "
            "on the dtype"
        )
    return first


def held_by(cascade: Cascade, batch: Arguments, stages: Sequence[Branch]) -> list[Tensor]:
    """What others hold, and a stage may return as it is."""
    fuse = [cascade.fuse] if isinstance(cascade.fuse, Branch) else []
    buffers = [buffer for part in (*stages, *fuse) for buffer in part.buffers_held()]
    return [*batch.held(), *buffers]
