"""NestedFusion: one gate decides per sample how deep an auxiliary stream goes; only that runs."""

from __future__ import annotations

from collections.abc import Iterable

from ..branch import as_branch, part
from ..calling import Callee
from ..deciding import by_depth, decide
from .current import Pass
from .stack import StackFusion


class NestedFusion(StackFusion):
    """Fuses an auxiliary stream into a main one, for every sample only as deep as it needs.

    The fusion-level DynMM with one global gate. With m and a the two streams, d the depth that the
    gate chose for a sample, and k = 1..L:

        r = main_k(m);  a = aux_k(a);  m = fusion_k(r, a) where k <= d, else r

    Samples are sorted by depth once, the deepest first, so that every stage works on a prefix:
    one synchronisation with the device, one gather, one combine for the whole stack, none of the
    last two where all samples have one depth. An auxiliary stage or a fusion is never called
    without samples.

    Args:
        gate: module or `Branch`, called as gate(main, aux); returns logits [N, 1 + L], column d
            for depth d.
        main_stages: L modules; each takes what the one before made, [N, ...].
        aux_stages: L modules likewise, each called with the samples that reach it, [n, ...]. As
            `Branch(module, cost=...)`, here and for main stages and fusions, they tell `Routing`
            their cost per sample.
        fusions: L modules, fusion_k(r, a) -> like r in shape and dtype. One with the attribute
            `fuses_prefix = True`, as `SEAdd` has, is called with all rows of r and the n rows of
            a that still fuse; it fuses the first n of r and returns the others as they are.
        execution: "routed": as above. "masked": every stage on every sample, and
            m = skip_k * r + active_k * fusion_k(r, a) with weights 0 and 1. "dense": the same with
            probabilities, active_k = sum of p_d over d >= k, skip_k = 1 - active_k. "auto":
            routed or masked, as in `RoutedFusion`.
        gate_grad: the gradient of the gate where its graph is recorded; dm is the gradient of m
            after stage k. "straight_through": exactly that of masked execution,
            d/d active_k = <dm, fusion_k(r, a)> and d/d skip_k = <dm, r>; where a sample has
            stopped, its auxiliary stages and fusions run without a graph. "selected": of these
            two only that of what ran, so active_k where k <= d, else skip_k; cheaper, biased.
            "none": none. Dense execution always differentiates its probabilities.
        temperature: of the softmax.
        noise: None; "gumbel" to sample the depth (DynMM eq. 3) while training; "gumbel_always" to
            sample it in eval, too.
        batch_norm: what happens where an auxiliary stage or a fusion has train-mode BatchNorm.
            "masked": the stack runs masked, which is exact. "subset": it runs routed, on
            statistics of the samples that came so far.
        gate_returns: as in `RoutedFusion`, with depths for branches; "weights" have exactly one one
            in a row.
        starved: what an auxiliary stage or a fusion does that no sample reaches. "skip": it is not
            called. "run": all are called in every call, and as often, on two samples at least (or
            what the batch has), as in `RoutedFusion`.

    Dropout draws differ between masked and routed execution.
    """

    def __init__(
        self,
        gate: Callee,
        main_stages: Iterable[Callee],
        aux_stages: Iterable[Callee],
        fusions: Iterable[Callee],
        *,
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
        self.gate = as_branch(gate, "the gate", "the gate")

    def _run_gated(self, current: Pass) -> None:
        num_depths, gate = len(current.cells) + 1, part(self, "gate")
        rule, logits = self._ask(gate, *current.inputs, num_depths, current)
        current.gate_cost = gate.cost or 0.0
        sort = by_depth(rule, num_depths)
        learns, dense = self.learns(logits), self.execution == "dense"
        current.decision = decide(
            self, rule, logits, sort, learns=learns, reports=current.reports, dense=dense
        )
        if dense:
            self._run_dense(current)
        else:
            self._run_to_depth(current)
