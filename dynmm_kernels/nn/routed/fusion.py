"""RoutedFusion: a gate decides per sample which branch it needs; only that branch runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import checks, sorting
from ..adaptive import Adaptive
from ..arguments import Arguments
from ..branch import Branch, Branches, as_branch, part
from ..calling import Callee, joined
from ..capture import Capture
from ..decision import Decision, forced, forced_mask, uniform
from ..gates import ask
from ..processes import RUN_ALL, may_shard, refuse_sharded
from ..replays import Replay
from ..routing import Routing
from ..rules import MULTI_HOT, TOP_ONE, rule_of
from . import ways


class RoutedFusion(Adaptive):
    """Runs, for every sample, the branch its gate chooses, and only that (DynMM, eq. 1-3).

    Args:
        gate: module, function or `Branch`, called like a branch; returns logits [N, B].
            None: every call brings `choice`.
        branches: modules, functions or `Branch`es, a sequence or a dict by name. All return the
            same structure: a tensor [n, ...] or a pytree of such. Beside these, 0-dim floating
            tensors are auxiliary losses: each branch's of the rows it ran on, summed unweighted
            over the branches that somebody chose (dense: all of them). With these, "auto" is
            "routed".
        execution: "routed": each branch on its own samples only. "masked": every branch on every
            sample, times 0 or 1. "dense": every branch on every sample, times its probability.
            "auto": routed or masked, whichever was measured to be faster here for such batches;
            masked, it selects in place of multiplying. Without evidence routed. See `explain`.
        gate_grad: the gradient of the gate where its graph is recorded. "straight_through": exactly
            that of masked execution; the samples a branch was not chosen for run through it without
            a graph. "selected": from the chosen branch alone; cheapest, biased. "none": none.
            Dense execution always differentiates its probabilities.
        temperature: of the softmax.
        noise: None; "gumbel" to sample the choice (DynMM eq. 3) while training; "gumbel_always" to
            sample it in eval, too.
        select: how many branches a sample takes. 1: that of the largest logit. k: those of the k
            largest, weighted by the softmax over these k (mixture of experts; `gate_grad`
            "selected" and "straight_through" are then the same). "multi_hot": every branch whose
            logit is positive, unweighted and summed, with the straight-through gradient of the
            sigmoid (AdaMML); none: zeros.
        batch_norm: what a branch with train-mode BatchNorm does when routed. "masked": it runs on
            the whole batch, which is exact. "subset": on its own samples, whose statistics differ.
        gate_returns: "logits". "probabilities": a softmax was applied already ("multi_hot": a
            sigmoid); the temperature is not used. "weights": zeros and ones with a gradient of
            their own, such as hard Gumbel-softmax; a one for each branch that a sample takes, and
            with `select` other than 1 any number of them, summed unweighted.
        starved: what a branch does that has no samples. "skip": it is not called. "run": every
            branch is called in every call, and as often, on copies of a sample where it has fewer
            than two; so that processes that share its weights (FSDP, tensor parallel) stay in
            step. What becomes of the copies is not used, and sends no gradient.

        outputs: "sum": of the branches, each times its weight. Else what each branch says stays
            apart: for branch b out_b = w_b * E_b(x) + (1 - w_b) * fill, in every execution, with
            the weights and the gradient of the gate as in the sum. "stack": [N, B, ...], of one
            shape. "concat": along dim 1 in the order of the branches, whose widths may differ.
            "dict": by name, each with a structure of its own. A branch that nobody chose is called
            without a graph on copies of a sample where its shape is needed ("concat", "dict").
        fill: what stands where a sample did not take a branch; a finite number.

    All ten may be changed between calls; parameters and state_dict are the same in every mode.

    Example:
        >>> branches = {"cheap": nn.Linear(8, 3), "costly": nn.Linear(8, 3)}
        >>> fusion = RoutedFusion(nn.Linear(8, 2), branches)
        >>> choice = torch.tensor([0, 1, 0, 0])  # left out: the gate decides
        >>> output, routing = fusion(torch.randn(4, 8), choice=choice, return_routing=True)
        >>> output.shape, routing.counts
        (torch.Size([4, 3]), (3, 1))
    """

    captured: Capture | None = None

    def __init__(
        self,
        gate: Callee | None,
        branches: Sequence[Callee] | Mapping[str, Callee] | nn.ModuleDict,
        *,
        execution: str = "auto",
        gate_grad: str = "straight_through",
        temperature: float = 1.0,
        noise: str | None = None,
        select: int | str = 1,
        batch_norm: str = "masked",
        gate_returns: str = "logits",
        starved: str = "skip",
        outputs: str = "sum",
        fill: float = 0.0,
    ) -> None:
        super().__init__(execution, gate_grad, temperature, noise, batch_norm, gate_returns)
        if not isinstance(branches, Iterable):
            raise TypeError(
                f"RoutedFusion: branches must be a sequence or a dict of modules; got "
                f"{type(branches).__name__}"
            )
        named: Iterable[tuple[Any, Callee]] = (
            branches.items()
            if isinstance(branches, (Mapping, nn.ModuleDict))
            else enumerate(branches)
        )
        self.register_module("gate", None)
        if gate is not None:
            self.gate = as_branch(gate, "gate", "the gate")
        self.branches = Branches(as_branch(module, str(name)) for name, module in named)
        names = [branch.name for branch in self.branches]
        if not names:
            raise ValueError("RoutedFusion: branches is empty; give at least one module")
        if len(set(names)) < len(names):
            raise ValueError(f"RoutedFusion: branch names must differ; got {names}")
        self.select = select
        self.starved = starved
        self.outputs = outputs
        self.fill = fill

    def forward(
        self,
        *inputs: Any,
        choice: int | str | Tensor | None = None,
        return_routing: bool = False,
        generator: torch.Generator | None = None,
        **named: Any,
    ) -> Any:
        """The fused output, in sample order.

        Args:
            inputs, named: what the model takes, by position and by keyword: tensors [N, ...] in any
                nesting of lists, tuples and dicts. `Shared` and `Lazy` mark what is not gathered,
                or only fetched when needed.
            choice: forces a hard decision, in any mode, and the gate is not run. An int: that
                branch for all. A LongTensor [N]: one per sample, -1 for none (zero output). A bool
                tensor [N, B]: every branch that is True, summed, such as the modalities there are;
                for one branch also [N].
                "random": each equally likely (DynMM's Stage I). "uniform": the mean of all.
            return_routing: also return the `Routing`.
            generator: for the gate noise, and for random choices: these are drawn on the host, and
                nothing waits for the device, unless it is a generator of the device.

        Raises:
            ValueError, TypeError: gate logits, choice, inputs or outputs that do not fit; the
                message names the branch, what came and what was wanted.
        """
        if named:
            inputs = joined(inputs, named)
        elif not (return_routing or torch.is_grad_enabled() or choice is not None):
            output = ways.run_short(self.__dict__, inputs)
            if output is not None:
                return output
        if may_shard() and self.starved == "skip" and self.execution in ("auto", "routed"):
            refuse_sharded(self, part(self, "branches").all(), RUN_ALL)
        batch, branches = Arguments(inputs, "RoutedFusion inputs"), part(self, "branches").all()
        before = self.captured.counts() if return_routing and self.captured else None
        if choice is None:
            decision = self._decide(batch, len(branches), return_routing, generator)
        else:
            decision = _obey(choice, batch, len(branches), generator)
        way = ways.SUMMED if self.outputs == "sum" else ways.apart(self.outputs, self.fill)
        output, rows_run = ways.run(self, branches, batch, decision, self.starved == "run", way)
        if not return_routing:
            return output
        return output, Routing(
            decision,
            num_rows=rows_run[0] if decision.choice is None else decision.choice.shape[0],
            rows_run=rows_run,
            costs=self.costs(),
            gate_cost=(self.gate.cost or 0.0) if choice is None else 0.0,
            replays=None if before is None else self.captured.since(before),  # type: ignore[union-attr]
        )

    def _decide(
        self,
        batch: Arguments,
        num_branches: int,
        reports: bool,
        generator: torch.Generator | None,
    ) -> Decision:
        """Asks the gate."""
        gate: Branch | None = part(self, "gate")
        if gate is None:
            raise ValueError("RoutedFusion: wanted choice=, because it has no gate; got None")
        own = gate.arguments(batch)
        arguments = own.whole(batch.num_rows, copied=gate.in_place)
        logits = ask(gate, arguments, own.tensors(), batch.num_rows, num_branches, batch.device)
        rule = self.rule
        if self.draws:
            rule, logits = rule.draw(logits, generator)
        learns = self.learns(logits)
        if self.execution == "dense":
            checks.check_defined(logits, rule.undefined(logits), wanted=rule.wanted)
            return Decision(rule, probs=rule.probs(logits, self.temperature))
        choice, plan = rule.decide(logits, self)
        plan.prefetch(partial(checks.check_faults, logits, wanted=rule.wanted))
        if not (learns or reports or self.select != 1):
            return Decision(rule, choice, plan)
        probs = rule.probs(logits, self.temperature)
        weights = rule.rank_weights(choice, probs if learns else probs.detach())
        grad = self.gate_grad if learns and weights is None else None
        return Decision(rule, choice, plan, probs, weights, grad)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "select":
            rule_of(value, len(self.branches))  # refuses what is none
        super().__setattr__(name, value)
        if name in ("select", "gate_returns") and "select" in self.__dict__:
            self.rule = rule_of(self.select, len(self.branches), self.gate_returns)

    def capture(
        self, *example: Any, max_rows: int, replay: Replay | None = None, **named: Any
    ) -> Capture:
        """Records the branches as CUDA graphs, to be replayed where launching them costs most.

        For eval without gradients. One graph per branch and bucket of rows: powers of two, and
        `max_rows`. Calls with more rows, or of another kind, run eagerly; the `Capture` counts
        them with their reasons, and `Usage.replays` both. A branch whose parameters are moved or
        replaced is recorded again; what is loaded into them is simply used. Calls that are not
        recorded yet are slow once, and wait for the device.

        Args:
            example, named: the arguments of a call; all buckets are recorded now. None: each at
                its first use, for the kind of inputs (shapes but for the rows, dtypes, layout,
                autocast) that a branch is called with first.
            max_rows: of the largest bucket. A branch keeps tensors for twice as many rows at most.
            replay: how recorded calls run again; default `CudaGraphReplay()`.

        Raises:
            ValueError: a branch that cannot be replayed, and why: it is in train mode, has hooks
                or a BatchNorm over the batch, or reads a `Lazy` input; given an example, also one
                that draws random numbers, writes into its buffers or attributes, or waits for the
                device. No GPU and no `replay`.
        """
        self.release()
        captured = Capture(part(self, "branches").all(), max_rows, replay)
        if example or named:
            captured.record(Arguments(joined(example, named), "the example of capture"))
        captured.attach()
        self.captured = captured
        return captured

    def release(self) -> None:
        """Frees what `capture` recorded; the branches run eagerly again."""
        if self.captured is not None:
            self.captured.release()
        self.captured = None

    def _part_names(self) -> list[str]:
        return [branch.label for branch in part(self, "branches").all()]

    def costs(self) -> tuple[float, ...] | None:
        """Cost per sample of each branch; None where a branch has none."""
        costs = [branch.cost for branch in part(self, "branches").all()]
        return None if None in costs else tuple(costs)


def _obey(
    choice: Any, batch: Arguments, num_branches: int, generator: torch.Generator | None
) -> Decision:
    """A forced decision."""
    size, device = batch.num_rows, batch.device
    mask = isinstance(choice, Tensor) and choice.dtype == torch.bool
    if mask and choice.ndim == num_branches == 1:
        choice = choice.unsqueeze(1)
    if mask and choice.ndim == 2:
        several = forced_mask(choice, "choice", num_branches, size, device)
        return Decision(MULTI_HOT, several, sorting.route(several, num_branches))
    if isinstance(choice, str) and choice == "uniform":
        everyone, _ = forced(0, "choice", num_branches, size, device)  # checks that N is known
        like = next((t for t in batch.tensors() if t.dtype == torch.float64), everyone.float())
        return uniform(everyone.shape[0], num_branches, like)
    if mask:
        raise TypeError(
            "choice must be an int or a LongTensor [N], or bools with a column for each branch, "
            f"[N, {num_branches}]; got torch.bool {list(choice.shape)}"
        )
    chosen, counts = forced(choice, "choice", num_branches, size, device, generator)
    if counts is not None:
        return Decision(TOP_ONE, chosen, sorting.route_counted(chosen, counts))
    return Decision(TOP_ONE, chosen, sorting.route(chosen, num_branches))
