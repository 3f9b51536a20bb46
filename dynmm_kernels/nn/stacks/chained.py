"""ChainedFusion: before every cell its own gate decides which samples go on fusing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import checks, sorting
from ..branch import Branch, forward_only, part
from ..decision import Decision
from ..gates import Gates
from ..rules import TOP_ONE, one_hot, straight_through
from .prefix import FOLLOWS, FUSES, THROUGH, Prefix
from .stack import Pass, StackFusion, hide_unselected
from .stage import Cell

_RULES = ("skip", "fuse", "dynamic")


class ChainedFusion(StackFusion):
    """Fuses an auxiliary stream into a main one; every cell decides from its own features.

    The fusion-level DynMM with one gate per cell. With m and a the two streams, keep_0 = 1 and
    k = 1..L:

        keep_k = keep_(k-1) * own_k          once dropped, stays dropped
        r = main_k(m);  a = aux_k(a);  m = (1 - keep_k) * r + keep_k * fusion_k(r, a)

    own_k is the gate's decision in a dynamic cell and 1 in a static one. The samples that survive
    are kept in front: where some of them drop out, both streams are sorted again, so that every
    stage works on a prefix. That is one synchronisation with the device per dynamic cell; while
    nobody or everybody drops out, nothing is moved.

    Args:
        gates: L modules or `Branch`es, called as gate(m, a) on what the cell before returned;
            logits [n, 2], column 0: drop, column 1: keep. None for a static cell.
        main_stages, aux_stages, fusions: as in `NestedFusion`.
        rules: for each cell "dynamic"; "fuse": whatever survives is fused; or "skip": nothing is
            fused in this cell, and the auxiliary stream goes on. Default: dynamic where there is a
            gate, else fuse. Auxiliary stages behind the last fusion never run.
        execution: "routed", "masked", "dense" (own_k is a probability) or "auto" (routed).
        gate_grad: "straight_through": exactly that of masked execution,
            d/d keep_k = <dm, fusion_k(r, a) - r>, through the product above to all gates up to k.
            So a dropped sample follows without a graph as long as later gates would have kept it.
            "selected": what ran teaches. Survivors: d/d keep_k = <dm, fusion_k(r, a)>; a dropped
            sample: -<dm, r> for the cell that dropped it, nothing from later ones. "none": none.
        temperature, batch_norm: as in `NestedFusion`; BatchNorm in a gate counts as well.
        noise: None; "gumbel" to sample the decisions while training; "gumbel_always" in eval, too
            (as DynMM's code does). Routed execution draws for survivors only, so the draws differ
            from those of masked execution.

    The depth of a sample, forced or reported, is the number of cells it comes through; in forced
    execution, too, a cell with the rule "skip" fuses nothing.
    """

    def __init__(
        self,
        gates: Iterable[nn.Module | None],
        main_stages: Iterable[nn.Module],
        aux_stages: Iterable[nn.Module],
        fusions: Iterable[nn.Module],
        *,
        rules: Sequence[str] | None = None,
        execution: str = "auto",
        gate_grad: str = "straight_through",
        temperature: float = 1.0,
        noise: str | None = None,
        batch_norm: str = "masked",
    ) -> None:
        super().__init__(
            main_stages,
            aux_stages,
            fusions,
            execution=execution,
            gate_grad=gate_grad,
            temperature=temperature,
            noise=noise,
            batch_norm=batch_norm,
        )
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

    def _gate(self, k: int) -> Branch | None:
        gates: dict[str, Any] = part(self, "gates")._modules
        return gates.get(str(k))

    def _gate_reads(self, k: int) -> bool:
        return self._gate(k) is not None

    def _run_gated(self, current: Pass) -> None:
        gates = part(self, "gates")._modules.values()
        coupled = self.batch_norm == "masked" and any(gate.couples_samples() for gate in gates)
        if self.execution == "dense" or coupled or self._runs_everywhere(current):
            self._run_chain_everywhere(current)
        else:
            self._run_chain(current)

    def _run_chain(self, current: Pass) -> None:
        """Routed."""
        exact, size = self.gate_grad == "straight_through", current.num_rows
        prefix, keep = Prefix(current.inputs, current.reads_aux), None
        keeps: list[Tensor | None] = []
        depth = torch.zeros(size, dtype=torch.int64, device=current.inputs[0].device)
        for k, cell in enumerate(current.cells, start=1):
            gate = self._gate(k)
            keep = None if keep is None else _padded(keep[: prefix.active + prefix.following], size)
            if gate is not None:
                asked = prefix.active + prefix.following
                current.gate_cost += (gate.cost or 0.0) * asked / size
                keep = self._drop(current, prefix, gate, keep)
            prefix.step(cell, None if keep is None else torch.stack([1 - keep, keep], 1), exact)
            if k in current.wanted:
                current.outputs[k] = prefix.read()
            if current.reports:
                keeps.append(None if keep is None else prefix.restore(keep))
                came = slice(prefix.active)
                depth[came if prefix.plan is None else prefix.plan.order[came].long()] = k
        current.rows_run = prefix.rows_run
        if current.reports:
            self._report(current, depth, keeps)

    def _drop(
        self, current: Pass, prefix: Prefix, gate: Branch, keep: Tensor | None
    ) -> Tensor | None:
        """Asks the gate, sorts both streams; returns keep [N] by slots if a gate learned so far."""
        active, seen = prefix.active, prefix.active + prefix.following
        asked, learns = [], False
        if prefix.aux is None and self.gate_grad != "none":
            prefix.starved += gate.parameters()
        if prefix.aux is not None:
            logits = self._ask(gate, prefix.main[:active], prefix.aux, 2, current)
            prefix.see(prefix.main, prefix.aux)
            learns = self.learns(logits)
            asked.append(logits.detach())
        if prefix.rest is not None:
            with forward_only([gate]):
                main = prefix.main.detach()[active:seen]
                asked.append(self._ask(gate, main, prefix.rest, 2, current))
        if not asked:
            return keep
        decided = asked[0] if len(asked) == 1 else torch.cat(asked)
        choice = sorting.choose(decided)
        if learns or keep is not None:
            own = choice.to(decided.dtype if keep is None else keep.dtype)
            if learns:
                own = torch.cat([self._kept(choice[:active], logits), own[active:]])
            keep = _padded(own if keep is None else keep[:seen] * own, prefix.main.shape[0])
        follow = learns and self.gate_grad == "straight_through"
        level = torch.where(choice > 0, FUSES, FOLLOWS if follow else THROUGH)
        if active < seen:  # those that follow already never fuse again
            level = torch.cat([level[:active], choice[active:]])
        plan = sorting.route_descending(torch.where(choice < 0, -1, level), 3)
        samples = None if prefix.plan is None else prefix.plan.order
        checks.check_faults(decided, plan.host_header, gate.label, samples)
        return prefix.sort(plan, keep)

    def _kept(self, choice: Tensor, logits: Tensor) -> Tensor:
        """[n]: 1 for those that the gate keeps, else 0, with its gradient."""
        return straight_through(one_hot(choice, 2), TOP_ONE.probs(logits, self.temperature))[:, 1]

    def _run_chain_everywhere(self, current: Pass) -> None:
        """Masked and dense."""
        soft = self.execution == "dense"
        selected = self.gate_grad == "selected" and not soft
        main = current.inputs[0]
        dtype = torch.promote_types(main.dtype, torch.float32)
        keep = torch.ones(current.num_rows, dtype=dtype, device=main.device)
        keeps: list[Tensor | None] = []

        def weigh(k: int, main: Tensor, aux: Tensor) -> Tensor:
            nonlocal keep
            own, gate = torch.ones_like(keep), self._gate(k)
            if gate is not None:
                current.gate_cost += gate.cost or 0.0
                own = self._own(gate, self._ask(gate, main, aux, 2, current))
            if selected:
                own = torch.where(keep.detach() == 0, 0, own)
            keep = keep * own
            keeps.append(keep)
            pair = torch.stack([1 - keep, keep], 1)
            return hide_unselected(pair) if selected else pair

        self._run_everywhere(current, weigh, soft)
        if current.reports:
            came = torch.stack([keep.detach() != 0 for keep in keeps if keep is not None])
            self._report(current, came.sum(0), keeps)
            if soft:
                current.decision = Decision(TOP_ONE)

    def _own(self, gate: Branch, logits: Tensor) -> Tensor:
        """[N]: the weight of keeping."""
        choice = sorting.choose(logits.detach())
        checks.check_defined(logits, choice < 0, gate.label)
        if self.execution == "dense":
            return TOP_ONE.probs(logits, self.temperature)[:, 1]
        return self._kept(choice, logits) if self.learns(logits) else choice.to(logits.dtype)

    def _report(self, current: Pass, depth: Tensor, keeps: Sequence[Tensor | None]) -> None:
        plan = sorting.route_descending(depth, len(current.cells) + 1)
        current.decision = Decision(TOP_ONE, depth, plan)
        dtype = torch.promote_types(current.inputs[0].dtype, torch.float32)
        columns = [
            (depth >= k).to(dtype) if own is None else own for k, own in enumerate(keeps, start=1)
        ]
        current.keep = torch.cat([column.unsqueeze(1) for column in columns], 1)


def _padded(keep: Tensor, size: int) -> Tensor:
    """Zeros for the samples that are through."""
    return keep if len(keep) == size else torch.cat([keep, keep.new_zeros(size - len(keep))])
