"""ChainedFusion: before every cell its own gate decides which samples go on fusing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import autograd, checks, sorting
from ..branch import Branch, forward_only, part
from ..calling import Callee
from ..decision import Decision, drawn, upload
from ..gates import Gates
from ..rules import TOP_ONE, Rule
from ..tracing import holds_ops, refuse_routed
from .chain import Chain, Kept
from .current import Pass
from .prefix import FOLLOWS, FUSES, THROUGH, Prefix
from .stage import Cell
from .weights import hide_unselected, padded, skip_or_fuse

_RULES = ("skip", "fuse", "fuse_all", "dynamic")


class ChainedFusion(Chain):
    """Fuses an auxiliary stream into a main one; every cell decides from its own features.

    The fusion-level DynMM with one gate per cell. With m and a the two streams, keep_0 = 1 and
    k = 1..L:

        keep_k = keep_(k-1) * own_k          once dropped, stays dropped
        r = main_k(m);  a = aux_k(a);  m = (1 - keep_k) * r + keep_k * fusion_k(r, a)

    own_k is the gate's decision in a dynamic cell and 1 in a static one; in a cell with the rule
    "fuse_all" m = fusion_k(r, a), whatever keep_k is. The samples that survive
    are kept in front: where some of them drop out, both streams are sorted again, so that every
    stage works on a prefix. That is one synchronisation with the device per dynamic cell; while
    nobody or everybody drops out, nothing is moved.

    Args:
        gates: L modules or `Branch`es, called as gate(m, a) on what the cell before returned, the
            first on the inputs; logits [n, 2], column 0: drop, column 1: keep. None for a static
            cell.
        main_stages, aux_stages, fusions: as in `NestedFusion`.
        rules: for each cell "dynamic"; "fuse": whatever survives is fused; "fuse_all": every sample
            is, also what was dropped before, so that up to there auxiliary stages run on every
            sample (DynMM's block_rule 1); or "skip": nothing is fused in this cell, and the
            auxiliary stream goes on. Default: dynamic where there is a gate, else fuse. Auxiliary
            stages behind the last fusion never run.
        gates_read: "cells": gates read what the cell before returned. "stages": what its two stages
            returned, before the fusion, as in DynMM's SkipESANet.
        independent: keep_k = own_k: nobody is dropped for good, cells decide one by one (Stage I of
            that model). Then auxiliary stages run on every sample in any mode.
        execution: "routed", "masked", "dense" (own_k is a probability) or "auto" (whichever of the
            first two was measured to be faster here, for such N).
        gate_grad: "straight_through": exactly that of masked execution,
            d/d keep_k = <dm, fusion_k(r, a) - r>, through the product above to all gates up to k.
            So a dropped sample follows without a graph as long as later gates would have kept it.
            "selected": what ran teaches. Survivors: d/d keep_k = <dm, fusion_k(r, a)>; a dropped
            sample: -<dm, r> for the cell that dropped it, nothing from later ones. "none": none.
        temperature, batch_norm, gate_returns: as in `NestedFusion`, gates with two columns;
            BatchNorm in a gate counts as well.
        starved: as in `NestedFusion`, gates included; a stack with a cell "fuse_all" then runs
            masked.
        noise: None; "gumbel" to sample the decisions while training; "gumbel_always" in eval, too
            (as DynMM's code does). Routed execution draws for survivors only, so the draws differ
            from those of masked execution.

    The depth of a sample, forced or reported, is the number of cells it comes through; in forced
    execution, too, a cell with the rule "skip" fuses nothing, and one with "fuse_all" everything.
    Where cells are independent it is the number of those that fused it, and depth="random" tosses
    a coin for each dynamic cell.
    """

    def __init__(
        self,
        gates: Iterable[Callee | None],
        main_stages: Iterable[Callee],
        aux_stages: Iterable[Callee],
        fusions: Iterable[Callee],
        *,
        rules: Sequence[str] | None = None,
        gates_read: str = "cells",
        independent: bool = False,
        execution: str = "auto",
        gate_grad: str = "straight_through",
        temperature: float = 1.0,
        noise: str | None = None,
        batch_norm: str = "masked",
        gate_returns: str = "logits",
        starved: str = "skip",
    ) -> None:
        super().__init__(
            main_stages,
            aux_stages,
            fusions,
            starved,
            execution=execution,
            gate_grad=gate_grad,
            temperature=temperature,
            noise=noise,
            batch_norm=batch_norm,
            gate_returns=gate_returns,
        )
        self.gates_read = gates_read
        self.independent = independent
        given = [*gates]
        if rules is None:
            rules = ["fuse" if gate is None else "dynamic" for gate in given]
        self.rules = tuple(rules)
        if not len(given) == len(self.rules) == len(self.main_stages):
            raise ValueError(
                f"ChainedFusion: wanted one gate (or None) and one rule per cell, "
                f"{len(self.main_stages)}; got {len(given)} and {len(self.rules)}"
            )
        self.gates = Gates()
        for k, (gate, rule) in enumerate(zip(given, self.rules, strict=True), start=1):
            if rule not in _RULES:
                wanted = ", ".join(map(repr, _RULES))
                raise ValueError(f"ChainedFusion: a rule must be one of {wanted}; got {rule!r}")
            if (gate is None) == (rule == "dynamic"):
                raise ValueError(
                    f"ChainedFusion: a dynamic cell needs a gate, a static one has None; cell {k} "
                    f"is {rule!r} with gate {type(gate).__name__}"
                )
            if gate is not None:
                self.gates[str(k)] = gate

    def _cells(self) -> list[Cell]:
        fusing = [k for k, rule in enumerate(self.rules) if rule != "skip"]
        last = fusing[-1] if fusing else -1
        return [
            cell._replace(fuses=rule != "skip", reads=k <= last)
            for k, (cell, rule) in enumerate(zip(super()._cells(), self.rules, strict=True))
        ]

    def _last_whole(self, forced: bool) -> int:
        if self.independent and not forced:
            return len(self.rules)
        dropping, last = forced, 0
        for k, rule in enumerate(self.rules, start=1):
            dropping = dropping or rule == "dynamic"
            last = k if dropping and rule == "fuse_all" else last
        return last

    def _pair(self, weights: Tensor, k: int) -> Tensor:
        fused = self.rules[k - 1] == "fuse_all"
        return skip_or_fuse(torch.ones_like(weights[:, 0])) if fused else super()._pair(weights, k)

    def _obey(self, current: Pass, depth: Any) -> None:
        if not (self.independent and isinstance(depth, str) and depth == "random"):
            super()._obey(current, depth)
            return
        kept, device = self._nothing_dropped(current), current.inputs[0].device
        shape = (current.num_rows, len(current.cells))
        tossed = upload(drawn(2, shape, device, current.generator), device)
        weights = [
            toss.to(kept.keep.dtype) if rule == "dynamic" else kept.keep
            for toss, rule in zip(tossed.unbind(1), self.rules, strict=True)
        ]
        self._run_everywhere(current, lambda k, *_: skip_or_fuse(weights[k - 1]))
        if current.reports:
            kept.weights = [*weights]
            kept.depth = torch.stack(weights, 1).long().sum(1)
            self._report(current, kept)

    def _run_gated(self, current: Pass) -> None:
        self._run_faster(current, (), lambda: self._run_chain(current), self._gates_couple())

    def _runs_everywhere(self, current: Pass) -> bool:
        if self.execution == "dense" or self._is_known(current):
            return super()._runs_everywhere(current)
        if self.execution != "routed":
            return True
        if torch._C._are_functorch_transforms_active() or not holds_ops():
            refuse_routed(self)
        return super()._runs_everywhere(current)

    def _gates_couple(self) -> bool:
        gates = part(self, "gates")._modules.values()
        return self.batch_norm == "masked" and any(gate.couples_samples() for gate in gates)

    def _run_chain(self, current: Pass) -> None:
        size, last = len(current.cells), self._last_whole(False)
        in_step = self.starved == "run" or not self._is_known(current)
        whole = self.execution == "dense" or self._gates_couple() or self._runs_everywhere(current)
        if whole or (in_step and last):
            last = size
        kept, keep = self._nothing_dropped(current), None
        if in_step and not last:
            self._run_in_step(current, kept)
        elif last:
            prefix, keep = self._run_whole(current, kept, last)
        else:
            prefix = Prefix(current.inputs, any(cell.reads for cell in current.cells))
        if last < size and not in_step:
            self._run_routed(current, kept, prefix, keep, last)
        if current.reports:
            self._report(current, kept)
            if self.execution == "dense":
                current.decision = Decision(TOP_ONE)

    def _nothing_dropped(self, current: Pass) -> Kept:
        main = current.inputs[0]
        dtype = torch.promote_types(main.dtype, torch.float32)
        ones = torch.ones(current.num_rows, dtype=dtype, device=main.device)
        return Kept(ones, torch.zeros_like(ones, dtype=torch.int64))

    def _run_whole(self, current: Pass, kept: Kept, last: int) -> tuple[Prefix, Tensor | None]:
        """Masked and dense; where cells are left behind `last`, sorted by who goes on there.

        Returns the streams, and as `_drop` does the keep [N] by slots.
        """
        soft, routed = self.execution == "dense", last < len(current.cells)
        selected = self.gate_grad == "selected" and not soft
        drops = torch.zeros_like(kept.depth)  # how many gates dropped each sample

        def decide(k: int, main: Tensor, unfused: Tensor, aux: Tensor) -> None:
            nonlocal drops
            own, gate = torch.ones_like(kept.keep), self._gate(k)
            if gate is not None:
                current.gate_cost += gate.cost or 0.0
                read = main if self.gates_read == "cells" else unfused
                own = self._own(gate, *self._ask(gate, read, aux, 2, current))
            if routed:
                drops = drops + (own.detach() == 0)
            if self.independent:
                kept.keep = own.to(kept.keep.dtype)
                return
            if selected:  # what a dropped sample would do later is not known
                own = torch.where(kept.keep.detach() == 0, 0, own)
            kept.keep = kept.keep * own

        def weigh(k: int, *streams: Tensor) -> Tensor:
            decide(k, *streams)
            if current.reports:
                kept.depth = kept.depth + (kept.keep.detach() != 0)
            fused = self.rules[k - 1] == "fuse_all"
            weight = torch.ones_like(kept.keep) if fused else kept.keep
            kept.weights.append(weight)
            pair = skip_or_fuse(weight)
            return hide_unselected(pair) if selected else pair

        prefix = self._run_everywhere(current, weigh, soft, last)
        if not routed:
            return prefix, None
        assert prefix.unfused is not None
        assert prefix.aux is not None
        decide(last + 1, prefix.main, prefix.unfused, prefix.aux)
        if self._gate_reads(last + 1):
            prefix.see(prefix.main, prefix.unfused, prefix.aux)
        learns = autograd.is_followed(kept.keep)
        # One gate alone can still learn that it should have kept a sample.
        exact = learns and self.gate_grad == "straight_through"
        left = torch.where((drops == 1) & exact, FOLLOWS, THROUGH)
        plan = sorting.route_descending(torch.where(kept.keep.detach() > 0, FUSES, left), 3)
        return prefix, prefix.sort(plan, kept.keep if learns else None)

    def _run_routed(
        self, current: Pass, kept: Kept, prefix: Prefix, keep: Tensor | None, last: int
    ) -> None:
        """The cells behind `last`. Where there is one, the next gate was asked already."""
        exact, size = self.gate_grad == "straight_through", current.num_rows
        prefix.keeps_unfused = self.gates_read == "stages"
        for k, cell in enumerate(current.cells[last:], start=last + 1):
            gate = self._gate(k)
            if k > last + 1 or not last:
                asked = prefix.active + prefix.following
                keep = None if keep is None else padded(keep[:asked], size)
                if gate is not None:
                    current.gate_cost += (gate.cost or 0.0) * asked / size
                    keep = self._drop(current, prefix, gate, keep)
            prefix.step(cell, None if keep is None else skip_or_fuse(keep), exact)
            if k in current.wanted:
                current.outputs[k] = prefix.read()
            if current.reports:
                kept.weights.append(None if keep is None else prefix.restore(keep))
                came = slice(prefix.active)
                kept.depth[came if prefix.order is None else prefix.order[came].long()] = k
        current.rows_run = prefix.rows_run

    def _drop(
        self, current: Pass, prefix: Prefix, gate: Branch, keep: Tensor | None
    ) -> Tensor | None:
        """Asks the gate, sorts both streams; returns keep [N] by slots if a gate learned so far."""
        active, seen = prefix.active, prefix.active + prefix.following
        asked, learns = [], False
        read, prefix.unfused = prefix.main if prefix.unfused is None else prefix.unfused, None
        if prefix.aux is None and self.gate_grad != "none":
            prefix.starved += [*gate.parameters()]
        if prefix.aux is not None:
            rule, logits = self._ask(gate, read[:active], prefix.aux, 2, current)
            prefix.see(read, prefix.aux)
            learns = self.learns(logits)
            asked.append(logits.detach())
        if prefix.rest is not None:
            with forward_only([gate]):
                main = read.detach()[active:seen]
                rule, others = self._ask(gate, main, prefix.rest, 2, current)
                asked.append(others)
        if not asked:
            return keep
        decided = asked[0] if len(asked) == 1 else torch.cat(asked)
        choice = rule.choose(decided)
        if learns or keep is not None:
            own = choice.to(decided.dtype if keep is None else keep.dtype)
            if learns:
                own = torch.cat([self._kept(rule, choice[:active], logits), own[active:]])
            keep = padded(own if keep is None else keep[:seen] * own, prefix.main.shape[0])
        follow = learns and self.gate_grad == "straight_through"
        level = torch.where(choice < 0, -1, choice + FOLLOWS) if follow else choice * FUSES
        if active < seen:  # those that follow already never fuse again
            level = torch.cat([level[:active], choice[active:]])
        plan = sorting.route_descending(level, 3)
        checks.check_faults(decided, plan, gate.label, prefix.order, rule.wanted)
        return prefix.sort(plan, keep)

    def _own(self, gate: Branch, rule: Rule, logits: Tensor) -> Tensor:
        """[N]: the weight of keeping."""
        choice = rule.choose(logits)
        checks.check_defined(logits, choice < 0, gate.label, rule.wanted)
        learns = self.learns(logits)
        if self.execution == "dense":
            return rule.probs(logits, self.temperature)[:, 1]
        return self._kept(rule, choice, logits) if learns else choice.to(logits.dtype)

    def _report(self, current: Pass, kept: Kept) -> None:
        plan = sorting.route_descending(kept.depth, len(current.cells) + 1)
        current.decision = Decision(TOP_ONE, kept.depth, plan)
        columns = [
            (kept.depth >= k).to(kept.keep.dtype) if weight is None else weight
            for k, weight in enumerate(kept.weights, start=1)
        ]
        current.keep = torch.cat([column.unsqueeze(1) for column in columns], 1)
