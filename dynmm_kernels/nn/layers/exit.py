"""EarlyExit: every sample runs through as many layers as its gate asks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import sorting, tree
from ..adaptive import FORWARD, NO_GATE, Adaptive, hindrance, run_faster
from ..arguments import Arguments
from ..branch import Branch, Branches, as_branch, part
from ..calling import Callee, joined
from ..deciding import by_depth, decide
from ..decision import Decision, forced, uniform
from ..gates import ask
from ..processes import MASK_ALL, may_shard, refuse_sharded
from ..routed.execution import Result
from ..routing import DepthRouting
from ..rules import DEPTH_RULES, TOP_ONE, Rule
from ..stacks.stage import make_stages
from ..tracing import refuse_routed
from .leaving import Exits


class EarlyExit(Adaptive):
    """Runs every sample through as many layers as its gate asks, in one stream.

    With x_0 = x and x_k = layer_k(x_{k-1}, ...), a sample of depth d in 0..L becomes head_d(x_d),
    or x_d where there are no heads. Samples are sorted by depth once, the deepest first, so that
    every layer works on a prefix: one synchronisation with the device, one gather and one combine
    for all layers, no gather where all samples have one depth. Layers are never called without
    samples. What every sample needs stands before this module, and the gate may read it.

    Args:
        gate: module, function or `Branch`, called as gate(x, *others) with the whole batch; returns
            logits [N, 1 + L], column d for depth d. (Confidence in the logits of the exits
            themselves is the matter of `CascadeFusion`.)
        layers: L modules or functions, called as layer(x, *others) with the samples that reach
            them; each returns a tensor [n, ...]. As `Branch(module, cost=...)` they tell `Routing`
            their cost.
        heads: None: all x_d have one shape. A sequence of 1 + L modules: head d is called with the
            samples that leave at depth d. A module: one head, called with the result of all.
        execution: "routed": as above. "masked": every layer and head on every sample, and
            y = sum over d of w_d head_d(x_d), w in {0, 1}: what Gumbel-softmax exits are trained
            with (DynMM, eq. 3). "dense": the same with probabilities. "auto": routed or masked, as
            in `RoutedFusion`.
        gate_grad: the gradient of w where its graph is recorded. "straight_through": exactly that
            of masked execution, dL/dw_d = <dL/dy, head_d(x_d)> for every d; what a sample does not
            need runs without a graph for it. "selected": of the sample's own depth alone;
            cheaper, biased. "none": none.
        temperature, noise: as in `RoutedFusion`.
        batch_norm: what happens where a layer or a head has train-mode BatchNorm. "masked": all
            run masked, which is exact. "subset": they run routed, on statistics of the samples
            that came so far.
        gate_returns: as in `NestedFusion`.

    Example:
        >>> exits = EarlyExit(nn.Linear(8, 3), [nn.Linear(8, 8), nn.Linear(8, 8)])
        >>> x = torch.randn(4, 8)
        >>> y, routing = exits(x, depth=torch.tensor([0, 2, 1, 0]), return_routing=True)
        >>> torch.equal(y[0], x[0]), routing.rows_run
        (True, (4, 2, 1))
    """

    def __init__(
        self,
        gate: Callee,
        layers: Iterable[Callee],
        heads: Callee | Iterable[Callee] | None = None,
        *,
        execution: str = "auto",
        gate_grad: str = "straight_through",
        temperature: float = 1.0,
        noise: str | None = None,
        batch_norm: str = "masked",
        gate_returns: str = "logits",
    ) -> None:
        super().__init__(execution, gate_grad, temperature, noise, batch_norm, gate_returns)
        if not isinstance(layers, Iterable):
            raise TypeError(
                f"EarlyExit: layers must be a sequence of modules; got {type(layers).__name__}"
            )
        self.gate = as_branch(gate, "the gate", "the gate")
        self.layers = make_stages([*layers], "layer")
        if not len(self.layers):
            raise ValueError("EarlyExit: layers is empty; give at least one module")
        self.register_module("heads", None)
        self.register_module("head", None)
        if callable(heads) and not isinstance(heads, nn.ModuleList):
            self.head = as_branch(heads, "the head", "the head")
        elif heads is not None:
            each: Iterable[Any] = heads  # type: ignore[assignment]
            named = (as_branch(head, f"head {d}", f"head {d}") for d, head in enumerate(each))
            self.heads = Branches(named)
            if len(self.heads) != 1 + len(self.layers):
                raise ValueError(
                    f"EarlyExit: wanted a head for each depth, {1 + len(self.layers)} for "
                    f"{len(self.layers)} layers, or one module for all; got {len(self.heads)}"
                )

    def forward(
        self,
        x: Tensor,
        *others: Any,
        depth: int | str | Tensor | None = None,
        return_routing: bool = False,
        generator: torch.Generator | None = None,
        **named: Any,
    ) -> Any:
        """What the samples become, in their order; never x itself.

        Args:
            x: [N, ...], what the first layer reads.
            others, named: what every layer reads beside, in any nesting: tensors [N, ...] of which
                it gets its rows (masks), and `Shared` ones.
            depth: forces the decision, in any mode, and no gate is run. An int: that depth for
                all. A LongTensor [N]: one per sample, in 0..L. "random": each equally likely.
                "uniform": the mean over all depths.
            return_routing: also return the `DepthRouting`.
            generator: for the gate noise, and for random depths (without it the host draws them).

        Raises:
            ValueError, TypeError: inputs, logits, depth or outputs that do not fit; the message
                names the layer, what came and what was wanted.
        """
        if not isinstance(x, Tensor) or x.ndim == 0:
            got = type(x).__name__ if not isinstance(x, Tensor) else "a scalar"
            raise TypeError(f"EarlyExit: x must be a tensor [N, ...]; got {got}")
        batch, gate = Arguments(joined((x, *others), named), "EarlyExit inputs"), part(self, "gate")
        exits = Exits(self._all("layers") or [], self._all("heads"), batch)
        if may_shard() and self.execution in ("auto", "routed"):
            refuse_sharded(self, exits.parts, MASK_ALL)
        if depth is None:
            decision = self._ask(gate, exits, return_routing, generator)
        else:
            decision = self._obey(depth, x, len(exits.depths), generator)
        output, rows_run = self._run(exits, decision)
        head: Branch | None = part(self, "head")
        if head is not None:
            output = head.call([output])
        if not return_routing:
            return output
        return output, DepthRouting(
            decision,
            num_rows=x.shape[0],
            rows_run=rows_run,
            costs=self.costs(),
            gate_cost=(gate.cost or 0.0) if depth is None else 0.0,
        )

    def costs(self) -> tuple[float, ...] | None:
        """[1 + L], cost per sample of each depth; None where a layer has none.

        Heads without one count as free, and so does a head that all share.
        """
        total, costs = 0.0, [0.0]
        for layer in self._all("layers") or []:
            if layer.cost is None:
                return None
            total += layer.cost
            costs.append(total)
        heads = self._all("heads")
        if heads is None:
            return tuple(costs)
        return tuple(cost + (head.cost or 0.0) for cost, head in zip(costs, heads, strict=True))

    def _all(self, name: str) -> list[Any] | None:
        parts = part(self, name)
        return None if parts is None else parts.all()

    def _ask(
        self, gate: Branch, exits: Exits, reports: bool, generator: torch.Generator | None
    ) -> Decision:
        batch, num_depths = exits.batch, len(exits.depths)
        own = gate.arguments(batch)
        arguments = own.whole(batch.num_rows, copied=gate.in_place)
        logits = ask(gate, arguments, own.tensors(), batch.num_rows, num_depths, batch.device)
        rule: Rule = DEPTH_RULES[self.gate_returns]
        if self.draws:
            rule, logits = rule.draw(logits, generator)
        sort = by_depth(rule, num_depths)
        learns, dense = self.learns(logits), self.execution == "dense"
        return decide(self, rule, logits, sort, learns=learns, reports=reports, dense=dense)

    def _obey(
        self, depth: Any, x: Tensor, num_depths: int, generator: torch.Generator | None
    ) -> Decision:
        """A forced decision."""
        size = x.shape[0]
        if isinstance(depth, str) and depth == "uniform":
            return uniform(size, num_depths, x)
        chosen, counts = forced(depth, "depth", num_depths, size, x.device, generator)
        plan = sorting.route_descending(chosen, num_depths, counts)
        plan.prefetch(lambda made: sorting.check_levels(made, chosen, "depth"))
        return Decision(TOP_ONE, chosen, plan)

    def _run(self, exits: Exits, decision: Decision) -> Result:
        plan, batch = decision.plan, exits.batch
        whole = self.batch_norm == "masked" and any(p.couples_samples() for p in exits.parts)
        if plan is not None and plan.traced and self.execution == "routed":
            refuse_routed(self)
        if plan is None or plan.traced or whole or self.execution == "masked":
            if self.execution == "auto" and whole:
                self.chooser.last = "every layer needs the whole batch"
            result = exits.run_everywhere(decision)
            if plan is not None:
                plan.verify()
            return result
        if not batch.num_rows:
            return exits.run_everywhere(decision)
        reason = self.chooser.barred or hindrance()
        if any(isinstance(leaf, tree.Lazy) for leaf in batch.leaves):
            reason = reason or "masked execution would fetch all of a Lazy modality"
        if self.execution != "auto" or reason is not None:
            self.chooser.last = reason if self.execution == "auto" else None
            return exits.run_routed(decision)
        return run_faster(
            self.chooser,
            (decision.grad or NO_GATE) if torch.is_grad_enabled() else FORWARD,
            plan.num_rows,
            plan.counts,
            plan.order,
            (
                lambda: exits.run_routed(decision),
                lambda: exits.run_everywhere(decision, selects=True),
            ),
            lambda result: (tree.flatten(result[0])[0], batch.tensors()),
        )

    def _part_names(self) -> list[str]:
        return [f"depth {depth}" for depth in reversed(range(1 + len(self.layers)))]
