"""What the ways of a chain share, and the one that calls every stage and gate in every call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...functional import autograd, checks, sorting
from ..branch import Branch, forward_only, part
from ..rules import Rule, one_hot, straight_through
from .current import Pass
from .stack import StackFusion
from .steady import SteadyPrefix
from .weights import skip_or_fuse


@dataclass
class Kept:
    """What became of the samples of a batch so far, in its order."""

    keep: Tensor  # [N], the product of all decisions, with their gradient
    depth: Tensor  # int64 [N], how many cells each came through
    weights: list[Tensor | None] = field(default_factory=list)  # of fusions; None: as each came


class Chain(StackFusion):
    """A stack with a gate before each cell."""

    gates_read: str

    def _gate(self, k: int) -> Branch | None:
        gates: dict[str, Any] = part(self, "gates")._modules
        return gates.get(str(k))

    def _gate_reads(self, k: int) -> bool:
        return self._gate(k) is not None

    def _kept(self, rule: Rule, choice: Tensor, logits: Tensor) -> Tensor:
        """[n]: 1 for those that the gate keeps, else 0, with its gradient."""
        probs = rule.probs(logits, self.temperature)
        return straight_through(one_hot(choice, 2), probs)[:, 1]

    def _run_in_step(self, current: Pass, kept: Kept) -> None:
        """All cells, each gate, stage and fusion as often, whatever is decided."""
        prefix, keep = SteadyPrefix(current.inputs), None
        records = torch.is_grad_enabled() or autograd.follows_forward()
        exact = records and self.gate_grad == "straight_through"
        for k, cell in enumerate(current.cells, start=1):
            gate = self._gate(k)
            if gate is not None:
                keep = self._drop_in_step(current, prefix, gate, keep, exact)
            elif keep is not None and not exact:  # who was dropped learns nothing from later cells
                keep = torch.where(prefix.fuses(), keep, 0)
            prefix.step(cell, None if keep is None else skip_or_fuse(keep))
            if k in current.wanted:
                current.outputs[k] = prefix.read()
            if current.reports:
                kept.weights.append(None if keep is None else prefix.restore(keep))
                kept.depth = kept.depth + prefix.restore(prefix.fuses().long())
        current.rows_run = prefix.rows_run

    def _drop_in_step(
        self,
        current: Pass,
        prefix: SteadyPrefix,
        gate: Branch,
        keep: Tensor | None,
        exact: bool,
    ) -> Tensor | None:
        """Asks the gate, also about the rest, and sorts; keep [N] by slots if a gate learned."""
        read = prefix.unfused if self.gates_read == "stages" else prefix.main
        rule, logits = self._ask(gate, prefix.head(read), prefix.aux, 2, current)
        learns, chosen, asked = self.learns(logits), rule.choose(logits), prefix.size
        others = followed = None
        if prefix.rest is not None:
            with forward_only([gate]):
                rule, others = self._ask(gate, prefix.tail(read), prefix.rest, 2, current)
            followed, asked = rule.choose(others), asked + prefix.behind
            prefix.hidden += [*gate.parameters()]
        if gate.cost:
            current.gate_cost += gate.cost * asked / max(1, current.num_rows)
        choice = prefix.spread(chosen, followed)
        if learns or keep is not None:
            own = self._kept(rule, chosen, logits) if learns else chosen.to(logits.dtype)
            own = prefix.spread(own, None if followed is None else followed.to(own.dtype))
            keep = own if keep is None else keep * own
        # Who was dropped never fuses again.
        level = torch.where(prefix.fuses(), choice, choice.clamp_max(0))
        plan = sorting.route_descending(level, 2)
        decided = prefix.spread(logits.detach(), others)
        checks.check_faults(decided, plan, gate.label, prefix.order, rule.wanted)
        return prefix.sort(plan, keep, exact)
