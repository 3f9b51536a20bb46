"""A cascade whose stages are all called in every call: in a traced graph, on ranks in step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional import checks, movement, sorting
from ...functional.filled import LEAST, FilledPlan, fill
from ...functional.plan import RoutingPlan
from ..arguments import Arguments, gather_arguments
from ..branch import Branch
from ..decision import Decision
from ..rules import TOP_ONE
from .exits import DEFINED, Cascade, Logits, Outcome, check_stage
from .fuses import fuse_logits
from .scores import measure


class Steady:
    """`Routed` that calls each stage, on copies of the first sample where fewer than two are left.

    What becomes of the copies nobody reads, and they get a gradient of zero; so where a slope is
    infinite there, the gradient is nan, as in masked execution.

    Attributes:
        forced: where samples must leave, if that is decided already.
        stays: bool [N], who comes to the stage; None: all.
        plan: of one branch, where these are listed; None: all are there.
        so_far: [N, C], the logits of each stage so far that is still to be fused; zeros for those
            who had left.
        rows_run: rows of each stage so far.
        first: what the first stage returned.
    """

    __slots__ = ("batch", "cascade", "first", "forced", "plan", "rows_run", "so_far", "stays")

    def __init__(self, cascade: Cascade, batch: Arguments, forced: Decision | None) -> None:
        self.cascade = cascade
        self.batch = batch
        self.forced = forced
        self.stays: Tensor | None = None
        self.plan: FilledPlan | None = None
        self.so_far: list[Tensor] = []
        self.rows_run: list[int] = []
        self.first: Logits | None = None

    def run(self) -> Outcome:
        first, *others = self.cascade.stages
        fused = output = self._run_stage(first)
        ahead = None if self.forced is None else self._obey(self.forced)
        level = torch.zeros(fused.shape[0], dtype=torch.int64, device=fused.device)
        for s, stage in enumerate(others):
            if ahead is None:
                self.stays, self.plan = self._decide(s, fused)
            else:
                self.stays, self.plan = ahead[s]
            level = level + self.stays
            fused = self._run_stage(stage)
            output = torch.where(self.stays.unsqueeze(1), self._in_order(fused), output)
        decision = self.forced
        if decision is None:
            decision = Decision(TOP_ONE, level, sorting.route(level, len(self.cascade.stages)))
        return Outcome(output, decision, tuple(self.rows_run))

    def _run_stage(self, stage: Branch) -> Tensor:
        """The fused logits [n, C] of those who come to it, and of the copies."""
        batch, plan, fuse = self.batch, self.plan, self.cascade.fuse
        earlier, rows = self.so_far, batch.num_rows
        if plan is None:
            logits = stage.call_whole(batch, rows)
        else:
            own, rows = stage.arguments(batch), plan.counts[0]
            logits = stage.call(gather_arguments(plan, [0], [own], [stage.in_place]).pop())
            kept = len(earlier)
            if kept:
                earlier = movement.gather_slots(
                    plan, earlier, range(kept), [0] * kept, [rows] * kept
                )
        self.first = check_stage(logits, stage, rows, batch.device, self.first)
        self.rows_run.append(logits.shape[0])
        if fuse == "last":
            return logits
        if len(self.rows_run) < len(self.cascade.stages):
            self.so_far = [*self.so_far, self._in_order(logits)]
        return fuse_logits(fuse, [*earlier, logits])

    def _in_order(self, rows: Tensor) -> Tensor:
        """[N, ...] in sample order, zero for those who had left."""
        return rows if self.plan is None else movement.combine_rows(self.plan, [rows], [0])

    def _decide(self, s: int, fused: Tensor) -> tuple[Tensor, FilledPlan]:
        """Who goes on: those who came to stage s and whose score is too low to leave."""
        scores = self._in_order(measure(self.cascade.score, fused))
        stays = scores < self.cascade.thresholds[s]
        if self.stays is not None:
            stays = stays & self.stays
        plan = _only(stays, scores.isnan())
        checks.check_faults(scores, plan, self.cascade.stages[s].label, wanted=DEFINED)
        (filled,) = fill([plan], LEAST)
        return stays, filled

    def _obey(self, decision: Decision) -> list[tuple[Tensor, FilledPlan]]:
        """As `_decide`, by force, after every stage but the last; the host reads counts once."""
        exits, last = decision.choice, len(self.cascade.stages) - 1
        assert exits is not None
        wrong = (exits < 0) | (exits > last)
        stays = [exits > s for s in range(last)]
        plans = fill([_only(who, wrong) for who in stays], LEAST)
        return [*zip(stays, plans, strict=True)]


def _only(who: Tensor, wrong: Tensor) -> RoutingPlan:
    """The plan of one branch, which these samples take."""
    return sorting.route_unless(torch.where(who, 0, -1).unsqueeze(1), wrong, 1)
