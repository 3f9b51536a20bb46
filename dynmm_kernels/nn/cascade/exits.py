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

    def parts_left_out(self) -> list[Branch]:
        """What is not called where no sample comes to it."""
        return [*self.stages, *([self.fuse] if isinstance(self.fuse, Branch) else [])]


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
    """The samples of a batch that no stage has let go yet.

    Attributes:
        plan, branch: where they are listed, in ascending order; no plan: all are there.
    """

    __slots__ = ("batch", "branch", "plan")

    def __init__(self, batch: Arguments) -> None:
        self.batch = batch
        self.plan: RoutingPlan | None = None
        self.branch = 0

    def run(self, stage: Branch) -> Any:
        """What the stage returns for them, having been given nobody else."""
        if self.plan is None:
            return stage.call_whole(self.batch, self.batch.num_rows)
        own = stage.arguments(self.batch)
        return stage.call(gather_arguments(self.plan, [self.branch], [own], [stage.in_place]).pop())

    @property
    def rows(self) -> Tensor | None:
        """int32 [n]: which they are; None: all."""
        if self.plan is None:
            return None
        starts = self.plan.host_header
        return self.plan.order[starts[self.branch] : starts[self.branch + 1]]


class Routed:
    """Each stage on the samples that no earlier one let go.

    After stage s a sample is of level s where it leaves, and of level s + 1 where it goes on.

    Attributes:
        forced: where samples must leave, if that is decided already.
        level: int64 [N], of every sample after the last stage that let somebody go.
        counts: samples of each level.
        so_far: logits of the survivors, of each stage so far that is still to be fused.
        left: fused logits of those who left, by stage.
        rows_run: rows of each stage so far.
        first: what the first stage returned.
    """

    __slots__ = (
        "batch",
        "cascade",
        "counts",
        "first",
        "forced",
        "left",
        "level",
        "live",
        "rows_run",
        "so_far",
    )

    level: Tensor

    def __init__(self, cascade: Cascade, batch: Arguments, forced: Decision | None) -> None:
        self.cascade = cascade
        self.batch = batch
        self.forced = forced
        self.live = Survivors(batch)
        self.counts = [0] * len(cascade.stages)
        self.so_far: list[Tensor] = []
        self.left: dict[int, Tensor] = {}
        self.rows_run: list[int] = []
        self.first: Logits | None = None

    def run(self) -> Outcome:
        last = len(self.cascade.stages) - 1
        for s in range(last + 1):
            fused = self._run_stage(s)
            plan = None
            if s < last:
                plan = self._decide(s, fused) if self.forced is None else self._obey(s)
            if self.counts[s] == self.rows_run[s]:
                self.left[s] = fused
                break
            if self.counts[s] and plan is not None:
                self.left[s] = self._let_go(s, plan, fused)
        return self._report()

    def _run_stage(self, s: int) -> Tensor:
        """The fused logits [n, C] of the survivors."""
        stage, fuse = self.cascade.stages[s], self.cascade.fuse
        logits = self.live.run(stage)
        wanted = self.counts[s] if s else self.batch.num_rows
        self.first = check_stage(logits, stage, wanted, self.batch.device, self.first)
        self.counts[s] = logits.shape[0]
        self.rows_run.append(logits.shape[0])
        if fuse == "last":
            return logits
        self.so_far.append(logits)
        return fuse_logits(fuse, self.so_far)

    def _decide(self, s: int, fused: Tensor) -> RoutingPlan:
        """The survivors by their level; who scores high enough leaves."""
        scores, rows = measure(self.cascade.score, fused), self.live.rows
        level = torch.where(scores < self.cascade.thresholds[s], s + 1, s)
        plan = sorting.route_unless(level.unsqueeze(1), scores.isnan(), len(self.counts))
        checks.check_faults(scores, plan, self.cascade.stages[s].label, rows, DEFINED)
        self.counts[s : s + 2] = plan.counts[s : s + 2]
        if rows is None:
            self.level = level
        else:
            self.level.scatter_(0, rows.long(), level)
        return plan

    def _obey(self, s: int) -> RoutingPlan | None:
        """As `_decide`, by force; None where nobody leaves or nobody stays."""
        decision, rows = self.forced, self.live.rows
        assert decision is not None
        assert decision.choice is not None
        assert decision.plan is not None
        leave, size = decision.plan.counts[s], self.rows_run[s]
        self.counts[s : s + 2] = leave, size - leave
        if leave in (0, size):
            return None
        self.level = decision.choice.clamp_max(s + 1)
        level = self.level if rows is None else self.level.index_select(0, rows)
        counts = [0] * len(self.counts)
        counts[s : s + 2] = self.counts[s : s + 2]
        return sorting.route_counted(level, counts)

    def _let_go(self, s: int, plan: RoutingPlan, fused: Tensor) -> Tensor:
        """The fused logits of those who leave; the others go on."""
        kept, size, leave = len(self.so_far), plan.num_rows, self.counts[s]
        starts, stops = [0, *[leave] * kept], [leave, *[size] * kept]
        sources = [fused, *self.so_far]
        left, *self.so_far = movement.gather_slots(plan, sources, range(kept + 1), starts, stops)
        everybody = self.live.plan is None
        self.live.plan = plan if everybody else sorting.route_counted(self.level, self.counts)
        self.live.branch = s + 1
        return left

    def _report(self) -> Outcome:
        stages, left, ran = self.cascade.stages, self.left, len(self.rows_run)
        decision, plan = self.forced, self.live.plan
        if decision is None:
            if plan is None or [*plan.counts] != self.counts:
                plan = sorting.route_counted(self.level, self.counts)
            decision = Decision(TOP_ONE, self.level, plan)
        assert decision.plan is not None
        if len(left) == 1:
            (fused,) = left.values()
            output = apart(fused, held_by(self.cascade, self.batch, stages[:ran]))
        else:
            starts = [decision.plan.starts[s] for s in left]
            output = movement.combine_rows(decision.plan, [*left.values()], starts)
        if ran < len(stages) and torch.is_grad_enabled():
            (output,) = touch_starved([output], stages[ran:], self.batch)
        return Outcome(output, decision, (*self.rows_run, *[0] * (len(stages) - ran)))


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

    def wanted() -> str:  # called for messages alone: text would tie a traced graph to its rows
        return f"[{'N' if rows is None else rows}, {first.classes if first else 'C'}]"

    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{stage.label} must return floating logits {wanted()}; got {got}")
    shape, device = logits.shape, first.device if first else device
    if logits.layout is not torch.strided:
        raise TypeError(f"{stage.label} must return strided logits; got {logits.layout}")
    fits = len(shape) == 2 and rows in (None, shape[0]) and (not first or shape[1] == first.classes)
    if not fits or shape[1] == 0:
        like = f", as {first.label} does" if first else ", one row per sample it received"
        raise ValueError(
            f"{stage.label} must return logits of shape {wanted()}{like}; got {list(shape)}"
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
