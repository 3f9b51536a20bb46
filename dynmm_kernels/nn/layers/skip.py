"""SkipLayer: a layer that a sample runs through or skips."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...functional import autograd, sorting
from ..adaptive import Adaptive
from ..arguments import Arguments
from ..branch import Branch, as_branch, part
from ..calling import Callee, joined
from ..deciding import decide
from ..decision import Decision, forced
from ..gates import ask
from ..processes import RUN_ALL, may_shard, refuse_sharded
from ..routed import ways
from ..routing import Routing
from ..rules import TOP_ONE, OneWeight, rule_of
from .skipping import SKIP, Skipping

_WAYS = ways.SUMMED._replace(routed=Skipping)
_KEEP = "weights must be zeros and ones, here as [1 - keep, keep]"


class SkipLayer(Adaptive):
    """y = layer(x, ...) for the samples that keep the layer, y = x for those that skip it.

    For networks that decide layer by layer what a sample needs, such as ADMN's transformers
    (Wu et al., 2025). Skipped rows are not copied on the way: one pass writes the output, out of
    the batch and the rows that the layer returned.

    Args:
        layer: module, function or `Branch`, called as layer(x, *others) with the rows of the
            samples that keep it, never with none; returns what x is like, a tensor [n, ...] or a
            pytree.
        gate: module, function or `Branch`, called likewise with the whole batch; returns
            logits [N, 2], column 0 to skip, column 1 to run. None: every call brings `keep`.
        execution: "routed": as above. "masked": the layer on every sample and
            y = w layer(x) + (1 - w) x, w in {0, 1}. "dense": the same with the probability that
            the sample runs. "auto": routed or masked, as in `RoutedFusion`.
        gate_grad: the gradient of w where its graph is recorded. "straight_through": exactly that
            of masked execution, dL/dw = <dL/dy, layer(x) - x>; samples that skip run through the
            layer without a graph. "selected": <dL/dy, layer(x)> for those that keep the layer and
            -<dL/dy, x> for the others. "none": none.
        temperature, noise, batch_norm, gate_returns, starved: as in `RoutedFusion`, with the
            layer for its branches; "weights" are [1 - w, w].

    Example:
        >>> block = SkipLayer(nn.Linear(8, 8))
        >>> x = torch.randn(4, 8)
        >>> y = block(x, keep=torch.tensor([True, False, True, False]))
        >>> torch.equal(y[1], x[1])
        True
    """

    def __init__(
        self,
        layer: Callee,
        gate: Callee | None = None,
        *,
        execution: str = "auto",
        gate_grad: str = "straight_through",
        temperature: float = 1.0,
        noise: str | None = None,
        batch_norm: str = "masked",
        gate_returns: str = "logits",
        starved: str = "skip",
    ) -> None:
        super().__init__(execution, gate_grad, temperature, noise, batch_norm, gate_returns)
        self.layer = as_branch(layer, "layer", "the layer")
        self.register_module("gate", None)
        if gate is not None:
            self.gate = gate
        self.starved = starved

    def forward(
        self,
        x: Any,
        *others: Any,
        keep: bool | Tensor | None = None,
        return_routing: bool = False,
        generator: torch.Generator | None = None,
        **named: Any,
    ) -> Any:
        """y, in sample order; never x itself.

        Args:
            x: tensors [N, ...], as the layer returns them.
            others, named: what the layer reads beside, in any nesting: tensors [N, ...] of which
                it gets its rows (masks), and `Shared` ones.
            keep: the decision, made elsewhere; no gate is run. A bool: for all samples. A bool
                tensor [N]: one per sample. A floating tensor [N]: zeros and ones with a gradient
                of their own, such as straight-through ones, treated as `gate_grad` says.
            return_routing: also return the `Routing`, in which skipping is branch 0.
            generator: for the gate noise.

        Raises:
            ValueError, TypeError: logits, keep, inputs or outputs that do not fit; the message
                names the part, what came and what was wanted.
        """
        branches = [SKIP, part(self, "layer")]
        if may_shard() and self.starved == "skip" and self.execution in ("auto", "routed"):
            refuse_sharded(self, branches, RUN_ALL)
        batch = Arguments(joined((x, *others), named), "SkipLayer inputs")
        if keep is None:
            decision = self._ask(batch, return_routing, generator)
        else:
            decision = self._obey(keep, batch, return_routing)
        every = self.starved == "run"
        output, rows_run = ways.run(self, branches, batch, decision, every, _WAYS)
        if not return_routing:
            return output
        gate = part(self, "gate") if keep is None else None
        return output, Routing(
            decision,
            num_rows=rows_run[0] if decision.choice is None else len(decision.choice),
            rows_run=rows_run,
            costs=self.costs(),
            gate_cost=0.0 if gate is None else gate.cost or 0.0,
        )

    def costs(self) -> tuple[float, ...] | None:
        """Cost per sample of skipping and of running; None where the layer has none."""
        cost = part(self, "layer").cost
        return None if cost is None else (0.0, cost)

    def _ask(self, batch: Arguments, reports: bool, generator: torch.Generator | None) -> Decision:
        gate: Branch | None = part(self, "gate")
        if gate is None:
            raise ValueError("SkipLayer: wanted keep=, because it has no gate; got None")
        own = gate.arguments(batch)
        arguments = own.whole(batch.num_rows, copied=gate.in_place)
        logits = ask(gate, arguments, own.tensors(), batch.num_rows, 2, batch.device)
        rule = OneWeight() if self.gate_returns == "weights" else rule_of(1, 2, self.gate_returns)
        if self.draws:
            rule, logits = rule.draw(logits, generator)
        sort = partial(rule.decide, fusion=self)
        learns, dense = self.learns(logits), self.execution == "dense"
        return decide(self, rule, logits, sort, learns=learns, reports=reports, dense=dense)

    def _obey(self, keep: Any, batch: Arguments, reports: bool) -> Decision:
        """A decision that was made elsewhere."""
        if isinstance(keep, Tensor) and keep.is_floating_point():
            _check_keep(keep, batch)
            weights, rule = torch.stack([1 - keep, keep], 1), OneWeight()
            learns = self.gate_grad != "none" and autograd.is_followed(weights)
            sort = partial(rule.decide, fusion=self)
            return decide(
                self,
                rule,
                weights,
                sort,
                learns=learns,
                reports=reports,
                giver="keep",
                wanted=_KEEP,
            )
        if isinstance(keep, Tensor) and keep.dtype == torch.bool:
            _check_keep(keep, batch)
            choice = keep.long()
            return Decision(TOP_ONE, choice, sorting.route(choice, 2))
        if isinstance(keep, bool):
            choice, counts = forced(int(keep), "keep", 2, batch.num_rows, batch.device)
            assert counts is not None  # of an int the host knows them
            return Decision(TOP_ONE, choice, sorting.route_counted(choice, counts))
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(
            f"SkipLayer: keep must be a bool, or a bool or floating tensor [N]; got {got}"
        )

    def _part_names(self) -> list[str]:
        return [SKIP.label, part(self, "layer").label]


def _check_keep(keep: Tensor, batch: Arguments) -> None:
    if keep.ndim != 1 or batch.num_rows not in (None, keep.shape[0]):
        size = "N" if batch.num_rows is None else batch.num_rows
        raise ValueError(f"SkipLayer: keep must have shape [{size}]; got {list(keep.shape)}")
    if batch.device is not None and keep.device != batch.device:
        raise ValueError(
            f"SkipLayer: keep must be on {batch.device}, as the inputs are; got {keep.device}"
        )
