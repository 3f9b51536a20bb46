"""A main stream, and an auxiliary one that is fused into it only as far as a sample needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import movement, selecting, sorting
from ...functional.deferred import has_values, is_mapped
from ...functional.plan import RoutingPlan
from ..adaptive import FORWARD, NO_GATE, Adaptive, hindrance, run_faster
from ..branch import Branch, part
from ..calling import Callee
from ..decision import Decision, blend, forced, uniform
from ..gates import ask
from ..memory import apart, sharing
from ..processes import RUN_ALL, may_shard, refuse_sharded
from ..rules import DEPTH_RULES, TOP_ONE, Rule, as_column
from ..tracing import holds_ops, refuse_routed
from .current import Pass
from .prefix import Prefix
from .stage import Cell, make_stages
from .steady import SteadyPrefix
from .weights import hide_unselected, skip_and_fuse


class StackFusion(Adaptive):
    """What `NestedFusion` and `ChainedFusion` share: their stages, and how those run."""

    def __init__(
        self,
        main_stages: Iterable[Callee],
        aux_stages: Iterable[Callee],
        fusions: Iterable[Callee],
        starved: str,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.starved = starved
        for modules in (main_stages, aux_stages, fusions):
            if not isinstance(modules, Iterable):
                raise TypeError(
                    f"{type(self).__name__}: main_stages, aux_stages and fusions must be sequences "
                    f"of modules; got {type(modules).__name__}"
                )
        self.main_stages = make_stages([*main_stages], "main stage")
        self.aux_stages = make_stages([*aux_stages], "aux stage")
        self.fusions = make_stages([*fusions], "fusion")
        lengths = [len(self.main_stages), len(self.aux_stages), len(self.fusions)]
        if len(set(lengths)) > 1 or not lengths[0]:
            raise ValueError(
                f"{type(self).__name__}: wanted as many main stages as auxiliary stages and "
                f"fusions, and at least one; got {lengths[0]}, {lengths[1]} and {lengths[2]}"
            )

    def forward(
        self,
        main: Tensor,
        aux: Tensor,
        *,
        depth: int | str | Tensor | None = None,
        stages: Sequence[int] = (),
        return_routing: bool = False,
        generator: torch.Generator | None = None,
    ) -> Any:
        """What the last main stage, or its fusion, makes of the samples; in sample order.

        Args:
            main, aux: [N, ...] each, what the first stages read.
            depth: forces the decision, in any mode, and no gate is run. An int: that depth for
                all. A LongTensor [N]: one per sample, in 0..L. "random": each equally likely
                (DynMM's Stage I). "uniform": every stage on every sample, fused by the mean
                weight of equally likely depths.
            stages: numbers in 1..L. Their outputs after fusion are wanted as well; only these are
                put back in sample order.
            return_routing: also return the `DepthRouting`.
            generator: for the gate noise, and for random depths (without it the host draws them).

        Returns:
            The output [N, ...]; with `stages`, a pair of it and the list of their outputs. With
            return_routing, a pair of that and the routing.

        Raises:
            ValueError, TypeError: inputs, logits, depth or stage outputs that do not fit; the
                message names the stage, what came and what was wanted.
        """
        self._check_inputs(main, aux)
        last = len(self.main_stages)
        if not isinstance(stages, Sequence) or not all(
            type(k) is int and 1 <= k <= last for k in stages
        ):
            raise ValueError(
                f"{type(self).__name__}: stages must be numbers in 1..{last}, in a list; got "
                f"{stages!r}"
            )
        if may_shard() and self.starved == "skip" and self.execution in ("auto", "routed"):
            refuse_sharded(self, self._parts_left_out(), RUN_ALL)
        current = Pass((main, aux), self._cells(), {*stages, last}, return_routing, generator)
        if depth is None:
            self._run_gated(current)
        elif isinstance(depth, str) and depth == "uniform":
            current.decision = uniform(main.shape[0], last + 1, main)
            self._run_dense(current)
        else:
            self._obey(current, depth)
        result: Any = current.outputs[last]
        if stages:
            result = result, [current.outputs[k] for k in stages]
        return (result, current.routing()) if return_routing else result

    def _run_gated(self, current: Pass) -> None:
        raise NotImplementedError

    def _obey(self, current: Pass, depth: Any) -> None:
        """Runs a forced decision."""
        num_depths, device = len(current.cells) + 1, current.inputs[0].device
        size, generator = current.num_rows, current.generator
        chosen, counts = forced(depth, "depth", num_depths, size, device, generator)
        plan = sorting.route_descending(chosen, num_depths, counts)
        plan.prefetch(lambda made: sorting.check_levels(made, chosen, "depth"))
        current.decision = Decision(TOP_ONE, chosen, plan)
        self._run_to_depth(current)

    def _run_dense(self, current: Pass) -> None:
        """Every stage on every sample, weighted by the probabilities of all depths."""
        probs = current.decision.weights()
        self._run_everywhere(current, lambda k, *_: self._pair(probs, k), soft=True)

    def _run_to_depth(self, current: Pass) -> None:
        """Each sample as deep as it was decided; the plan has sorted them, the deepest first."""
        plan = current.decision.plan
        if plan is not None and plan.traced and not holds_ops():
            if self.execution == "routed":
                refuse_routed(self)
            current.blind = True
        known = plan is not None and not plan.traced and self.execution == "auto"
        counts = plan.counts if known else ()  # type: ignore[union-attr]
        self._run_faster(current, counts, lambda: self._run_decided(current))

    def _run_faster(
        self, current: Pass, counts: tuple[int, ...], run: Callable[[], None], whole: bool = False
    ) -> None:
        """`run()` as "auto" finds it faster, with `current.masked` or without."""
        if torch.compiler.is_compiling():  # nothing is measured, nor kept here
            run()
            return
        reason = self.chooser.barred or hindrance()
        if self.starved == "run":
            reason = "starved='run' calls every stage in every call"
        if whole or self._runs_everywhere(current):
            reason = "every stage needs the whole batch"
        elif any(cell.couples_samples() for cell in current.cells):
            reason = "BatchNorm on the samples that fuse is asked for"
        if reason is not None or self.execution != "auto":
            self.chooser.last = reason if self.execution == "auto" else None
            run()
            return
        gate_cost, decision = current.gate_cost, current.decision
        grad = decision.grad or (self.gate_grad if decision.choice is None else None)

        def start(masked: bool) -> None:
            current.masked, current.gate_cost = masked, gate_cost
            run()

        run_faster(
            self.chooser,
            (grad or NO_GATE) if torch.is_grad_enabled() else FORWARD,
            current.num_rows,
            counts,
            current.inputs[0],
            (lambda: start(False), lambda: start(True)),
            lambda _: (current.outputs.values(), current.inputs),
        )

    def _run_decided(self, current: Pass) -> None:
        decision, plan, last = current.decision, current.decision.plan, self._last_whole(True)
        learns, exact = decision.grad is not None, decision.exact
        everywhere = self._runs_everywhere(current) or (last > 0 and self.starved == "run")
        assert plan is not None
        prefix = Prefix(current.inputs, any(cell.reads for cell in current.cells))
        if everywhere or last:
            # Of a sum of weights all keep their gradient, and of a pair the one that is not zero.
            weights = decision.weights() if learns else decision.selected.float()

            def weigh(k: int, *_: Tensor) -> Tensor:
                pair = self._pair(weights, k)
                return pair if exact or not learns else hide_unselected(pair)

            prefix = self._run_everywhere(current, weigh, last=None if everywhere else last)
            if everywhere:
                plan.verify()
                return
        probs = decision.probs if learns else None
        if plan.traced or self.starved == "run":
            self._run_steady(current, plan, probs, exact)
            return
        if last < len(current.cells):
            probs = prefix.sort_by_depth(plan, last + 1, exact, probs)
        for k, cell in enumerate(current.cells[last:], start=last + 1):
            prefix.narrow(sorting.at_least(plan, k), exact)
            prefix.step(cell, None if probs is None else self._pair(probs, k), exact)
            if k in current.wanted:
                current.outputs[k] = prefix.read()
        current.rows_run = prefix.rows_run

    def _run_steady(
        self, current: Pass, plan: RoutingPlan, probs: Tensor | None, exact: bool
    ) -> None:
        """As `_run_decided`, and every stage is called, as often."""
        prefix = SteadyPrefix(current.inputs)
        probs, narrowed = prefix.sort_by_depth(plan, probs, exact)
        for k, cell in enumerate(current.cells, start=1):
            prefix.narrow(*narrowed[k - 1])
            prefix.step(cell, None if probs is None else self._pair(probs, k))
            if k in current.wanted:
                current.outputs[k] = prefix.read()
        current.rows_run = prefix.rows_run

    def _run_everywhere(
        self,
        current: Pass,
        weigh: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        soft: bool = False,
        last: int | None = None,
    ) -> Prefix:
        """Every cell on every sample, weighted: what DynMM's own code does.

        Args:
            weigh: weigh(k, main, unfused, aux) gives [N, 2], the weights of skipping and of fusing
                in cell k, out of what the cell before it returned, and its main stage before that.
            last: the last cell that runs so; None: all do.

        Returns:
            Both streams behind that cell.
        """
        main, aux = current.inputs
        unfused = main
        lent: list[Tensor] = []  # outputs that the caller reads
        seen: list[Tensor] = []  # what a gate or a fusion may keep for its backward pass
        rows_run = [current.num_rows]
        for k, cell in enumerate(current.cells[:last], start=1):
            weights = weigh(k, main, unfused, aux)
            if torch.is_grad_enabled() and self._gate_reads(k):
                seen += [main, unfused, aux]
            held = [*current.inputs, *lent, *seen]
            main = cell.main.run(cell.main.spare(main, [*held, aux]), read=[*current.inputs, *lent])
            if cell.reads:
                aux = cell.aux.run(cell.aux.spare(aux, [*held, main]), read=current.inputs)
            seen, unfused = sharing(seen, [main, aux]), main
            if cell.fuses:
                seen += [main, aux] if torch.is_grad_enabled() else []
                main = self._weigh(current, (main, cell.fuse(main, aux)), weights, soft)
            rows_run.append(current.num_rows if cell.reads else 0)
            if k in current.wanted:
                lent.append(main)
                current.outputs[k] = apart(main, current.inputs)
        current.rows_run = rows_run
        prefix = Prefix(current.inputs, any(cell.reads for cell in current.cells))
        prefix.main, prefix.aux, prefix.unfused = main, aux, unfused
        prefix.lent, prefix.seen, prefix.rows_run = lent, seen, rows_run
        return prefix

    def _weigh(
        self, current: Pass, column: tuple[Tensor, Tensor], weights: Tensor, soft: bool
    ) -> Tensor:
        """What a cell makes of its main stage and its fusion."""
        if soft or not current.masked:
            return blend(column, weights, soft)
        main, fused = movement.same_dtype(column)
        chosen = as_column(weights.detach()[:, 1] != 0, main)

        def select(out: Tensor | None = None) -> Tensor:
            return torch.where(chosen, fused, main, out=out)

        if weights.requires_grad and torch.is_grad_enabled():
            return selecting.select_learning((main, fused), weights, select)
        return select()

    def _pair(self, weights: Tensor, k: int) -> Tensor:
        """[N, 2], of skipping and fusing in cell k, out of the weights [N, 1 + L] of all depths."""
        return skip_and_fuse(weights, k)

    def _last_whole(self, forced: bool) -> int:
        """The last cell in which a sample fuses that had been dropped before; 0: there is none.

        Up to there the auxiliary stages run on every sample.
        """
        return 0

    def _gate_reads(self, k: int) -> bool:
        """Whether a gate reads what cell k starts from."""
        return False

    def _runs_everywhere(self, current: Pass) -> bool:
        if self.execution == "masked" or current.masked or current.blind:
            return True
        if self.starved == "skip" and not current.num_rows:
            return True
        return self.batch_norm == "masked" and any(cell.couples_samples() for cell in current.cells)

    def _ask(
        self, gate: Branch, main: Tensor, aux: Tensor, num_columns: int, current: Pass
    ) -> tuple[Rule, Tensor]:
        """What the gate returned, [n, C], with noise where that is wanted; and the rule for it."""
        read, rows = (main, aux), main.shape[0]
        logits = ask(gate, gate.select(read), read, rows, num_columns, main.device)
        rule: Rule = DEPTH_RULES[self.gate_returns]
        return rule.draw(logits, current.generator) if self.draws else (rule, logits)

    def _part_names(self) -> list[str]:
        return [f"depth {depth}" for depth in reversed(range(1 + len(self.main_stages)))]

    def _parts_left_out(self) -> list[Branch]:
        """What is not called where no sample needs it."""
        gates = self._modules.get("gates")  # before each cell its own, or one for all samples
        asked = [*gates._modules.values()] if gates else []
        return [*asked, *part(self, "aux_stages").all(), *part(self, "fusions").all()]

    def _is_known(self, current: Pass) -> bool:
        """Whether decisions can be read: nobody traces, and vmap maps neither data nor weights."""
        mapped = torch._C._are_functorch_transforms_active()
        return has_values(current.inputs[0]) and not (
            mapped and any(map(is_mapped, self.parameters()))
        )

    def _cells(self) -> list[Cell]:
        groups = ("main_stages", "aux_stages", "fusions")
        stages = zip(*(part(self, name).all() for name in groups), strict=True)
        return [Cell(*three) for three in stages]

    def _check_inputs(self, main: Any, aux: Any) -> None:
        label = type(self).__name__
        for name, tensor in (("main", main), ("aux", aux)):
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                got = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{label}: {name} must be a strided tensor [N, ...]; got {got}")
            if tensor.ndim == 0:
                raise ValueError(f"{label}: {name} must have shape [N, ...]; got a scalar")
        if main.shape[0] != aux.shape[0]:
            raise ValueError(
                f"{label}: main and aux must have the same number of samples in dim 0; got shapes "
                f"{list(main.shape)} and {list(aux.shape)}"
            )
        if main.device != aux.device:
            raise ValueError(
                f"{label}: main and aux must be on one device; got {main.device} and {aux.device}"
            )
