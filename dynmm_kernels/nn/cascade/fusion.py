"""CascadeFusion: modalities one after the other, until a sample is sure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import sorting
from ...functional.deferred import has_values, is_mapped
from ..arguments import Arguments
from ..branch import Branches, as_branch, part
from ..calling import Callee, joined
from ..decision import Decision, forced
from ..processes import RUN_ALL, may_shard, refuse_sharded
from ..rules import TOP_ONE
from ..tracing import MASKED, holds_ops, refuse_jit, refuse_routed
from .calibration import Calibration, calibrate
from .exits import Cascade, Routed, all_exits, all_scores, run_everywhere
from .fuses import as_fuse
from .routing import CascadeRouting
from .scores import Score, check_score
from .steady import Steady

_SETTINGS = {"execution": ("auto", "masked", "routed"), "starved": ("skip", "run")}


class CascadeFusion(nn.Module):
    """Runs its stages one after the other, each on the samples that none before was sure of.

    After every stage but the last, the logits of all stages so far are fused and scored. A sample
    whose score reaches the threshold leaves with these logits; the others go on to the next stage,
    with only their own rows of what that stage reads. The decision has no gradient; training runs
    all stages (`deep_supervision_loss`). It is neither QMF's nor DynMM's: the stages are those of
    an early-exit network (BranchyNet, 2016), modalities its layers.

    Args:
        stages: two or more modules or `Branch`es, a sequence or a dict by name, the cheapest first.
            Each returns floating logits [n, C] for the n samples it is given.
        score: how sure it is, larger for surer. "probability": the largest softmax probability.
            "margin": how far it is above the second. "entropy": 1 - entropy / log C. "energy": the
            logsumexp. A callable or module: logits [n, C] -> floating [n].
        threshold: a sample leaves where score >= threshold. One number, or one for each stage but
            the last. inf: nobody leaves there; -inf: everybody.
        fuse: what makes one of the logits so far. "energy": sum_m 0.1 logsumexp(x_m) x_m (QMF).
            "mean". "last": those of the last stage alone, which has seen its own inputs only. A
            module: called with the list of them, [n, C] each; returns [n, C].
        execution: "routed": each stage on its survivors only. "masked": all stages on all samples,
            then the same result is selected. "auto": routed; masked while a graph is traced.
        starved: what a stage does that no sample comes to. "skip": it is not called. "run": every
            stage is called in every call, on copies of a sample where fewer than two come, as in
            `RoutedFusion`.

    All but the stages may be changed between calls; like the settings of other fusions they are no
    part of the state_dict, modules apart.

    Example:
        >>> cascade = CascadeFusion([nn.Linear(8, 3), nn.Linear(8, 3)], fuse="mean").eval()
        >>> exit = torch.tensor([0, 1, 0, 0])  # left out: scores decide
        >>> output, routing = cascade(torch.randn(4, 8), exit=exit, return_routing=True)
        >>> output.shape, routing.counts, routing.rows_run
        (torch.Size([4, 3]), (3, 1), (4, 1))
    """

    threshold: Any  # float, or a tuple of them
    fuse: Any  # str or Branch

    def __init__(
        self,
        stages: Sequence[Callee] | Mapping[str, Callee] | nn.ModuleDict,
        *,
        score: Score = "probability",
        threshold: float | Sequence[float] = 0.9,
        fuse: str | Callee = "energy",
        execution: str = "auto",
        starved: str = "skip",
    ) -> None:
        super().__init__()
        if not isinstance(stages, Iterable):
            raise TypeError(
                f"CascadeFusion: stages must be a sequence or a dict of modules; got "
                f"{type(stages).__name__}"
            )
        named: Iterable[tuple[Any, Callee]] = (
            stages.items() if isinstance(stages, (Mapping, nn.ModuleDict)) else enumerate(stages)
        )
        self.stages = Branches(
            as_branch(module, str(name), f"stage {name!r}") for name, module in named
        )
        names = [stage.name for stage in self.stages]
        if len(names) < 2:
            raise ValueError(f"CascadeFusion: wanted at least two stages; got {len(names)}")
        if len(set(names)) < len(names):
            raise ValueError(f"CascadeFusion: stage names must differ; got {names}")
        self.score = score
        self.threshold = threshold
        self.fuse = fuse
        self.execution = execution
        self.starved = starved

    def forward(
        self,
        *inputs: Any,
        exit: int | Tensor | None = None,
        return_routing: bool = False,
        **named: Any,
    ) -> Any:
        """The fused logits [N, C], in sample order.

        In training all stages run on all samples, and the output is the fusion of all of them
        (with `exit`: that of the stages up to there).

        Args:
            inputs, named: what the model takes, by position and by keyword: tensors [N, ...] in any
                nesting of lists, tuples and dicts. `Shared` and `Lazy` mark what is not gathered,
                or only fetched for the samples that come to a stage.
            exit: forces the stage after which samples leave, counting from 0, and nothing is
                scored. An int: that stage for all. A LongTensor [N]: one per sample.
            return_routing: also return the `CascadeRouting`.

        Raises:
            ValueError, TypeError: logits, scores, exits or inputs that do not fit, a score that is
                nan; the message names the stage, what came and what was wanted.
        """
        batch = Arguments(joined(inputs, named), "CascadeFusion inputs")
        cascade = self._cascade()
        decision = None if exit is None else _obey(exit, len(cascade.stages), batch)
        known = self._is_known(batch)
        if self.training or self.execution == "masked" or not (known or self._routes_in_graph()):
            outcome = run_everywhere(cascade, batch, decision, self.training)
        elif self.starved == "run" or not known:
            outcome = Steady(cascade, batch, decision).run()
        else:
            if may_shard():
                refuse_sharded(self, cascade.parts_left_out(), RUN_ALL)
            outcome = Routed(cascade, batch, decision).run()
        if not return_routing:
            return outcome.output
        return outcome.output, CascadeRouting(
            outcome.decision,
            num_rows=outcome.output.shape[0],
            rows_run=outcome.rows_run,
            costs=self.costs(),
            exits=outcome.exits,
        )

    def _is_known(self, batch: Arguments) -> bool:
        """Whether decisions can be read: nobody traces, and vmap maps neither data nor weights."""
        mapped = torch._C._are_functorch_transforms_active()
        return all(map(has_values, batch.tensors())) and not (
            mapped and any(map(is_mapped, self.parameters()))
        )

    def _routes_in_graph(self) -> bool:
        """Whether a graph is traced that is to route; "auto" runs masked there."""
        if self.execution == "routed" and (
            torch._C._are_functorch_transforms_active() or not holds_ops()
        ):
            refuse_routed(self)
        return self.execution == "routed"

    def _slow_forward(self, *inputs: Any, **options: Any) -> Any:
        """What torch.jit.trace calls in place of `forward`."""
        if not (self.training or self.execution == "masked"):
            refuse_jit(self, MASKED)
        return super()._slow_forward(*inputs, **options)

    def _cascade(self) -> Cascade:
        stages = part(self, "stages").all()
        return Cascade(stages, self.score, self.thresholds, self.fuse)

    def _run_all(self, *inputs: Any) -> tuple[Tensor, list[Tensor]]:
        """Scores [N, S-1] and the fused logits [N, C] of every exit, all stages on all samples."""
        cascade = self._cascade()
        exits = all_exits(cascade, Arguments(inputs, "CascadeFusion inputs"))
        return all_scores(cascade, exits), exits

    def calibrate(
        self,
        batches: Iterable[tuple[tuple[Any, ...], Tensor | None]],
        *,
        risk: str = "gap",
        target: float = 0.01,
        delta: float = 0.1,
    ) -> Calibration:
        """Sets the boldest thresholds that keep a risk, and says what is guaranteed.

        All stages run on all rows, in eval mode without a graph. Thresholds are learnt on one half
        of the rows and tested on the other (Learn then Test, Angelopoulos et al. 2021, with a fixed
        sequence and exact binomial tests): with probability 1 - delta over the draw of these rows
        the risk is at most `target`, for samples drawn as they were. Needs scikit-learn.

        Args:
            batches: (inputs, targets) of rows that had no part in training: inputs a tuple, the
                arguments of a call; targets int64 [n], or None where the risk needs none.
            risk: the share of samples for which the cascade, "gap": is wrong where running every
                stage is right; "consistency": predicts another class than running every stage does,
                which needs no targets; "error": is wrong.
            target: of the risk, in 0..1.
            delta: how probable it may be that the risk exceeds the target.

        Returns:
            `Calibration`: thresholds, the curve of risk against what leaves and its cost, the risk
            per exit, the guarantee as a sentence.

        Raises:
            ValueError: too few rows for the target (the message says how many would do), targets
                that do not fit, or an "error" that running every stage exceeds already.
            ImportError: without scikit-learn.
        """
        scores, exits, targets, classes = self._collect(batches)
        found = calibrate(
            scores,
            exits,
            targets,
            self.costs(),
            risk=risk,
            target=target,
            delta=delta,
            classes=classes,
        )
        self.threshold = found.thresholds
        return found

    @torch.no_grad()
    def _collect(
        self, batches: Iterable[tuple[tuple[Any, ...], Tensor | None]]
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Scores [n, S-1], predicted classes [n, S] and targets [n] of all batches, and C."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        rows = []
        try:
            for number, batch in enumerate(batches):
                if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                    raise ValueError(
                        "CascadeFusion.calibrate: batches must give (inputs, targets), inputs a "
                        f"tuple of the call's arguments; got {type(batch).__name__}"
                    )
                inputs, targets = batch
                if not isinstance(inputs, tuple):
                    raise TypeError(
                        f"CascadeFusion.calibrate: the inputs of batch {number} must be a tuple, "
                        f"the arguments of a call; got {type(inputs).__name__}"
                    )
                scores, exits = self._run_all(*inputs)
                predicted = torch.stack([logits.argmax(1) for logits in exits], 1)
                rows.append((scores, predicted, targets, exits[0].shape[1]))
        finally:
            for module, training in modes:
                module.training = training
        if not rows:
            raise ValueError("CascadeFusion.calibrate: batches is empty")
        all_scores, predictions, given, classes = zip(*rows, strict=True)
        known = [targets for targets in given if targets is not None]
        if len(known) not in (0, len(given)):
            raise ValueError(
                "CascadeFusion.calibrate: wanted targets for all batches or for none; got them for "
                f"{len(known)} of {len(given)}"
            )
        targets = torch.cat(known) if known else None
        return torch.cat(all_scores), torch.cat(predictions), targets, classes[0]

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One per stage but the last."""
        threshold = self.threshold
        if isinstance(threshold, tuple):
            return threshold
        return (threshold,) * (len(part(self, "stages")) - 1)

    def costs(self) -> tuple[float, ...] | None:
        """Cost per sample of each stage; None where a stage has none."""
        costs = [stage.cost for stage in part(self, "stages").all()]
        return None if None in costs else tuple(costs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS and value not in _SETTINGS[name]:
            wanted = ", ".join(map(repr, _SETTINGS[name]))
            raise ValueError(f"CascadeFusion: {name} must be one of {wanted}; got {value!r}")
        if name == "threshold":
            value = _as_threshold(value, len(self.stages) - 1)
        if name == "score":
            check_score(value)
        if name == "fuse":
            value = as_fuse(value, self._modules.get("fuse"))
        if name in ("score", "fuse") and not isinstance(value, nn.Module):
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        known = {"execution": self.execution, "threshold": self.threshold}
        known |= {name: getattr(self, name) for name in ("score", "fuse")}
        shown = {k: v for k, v in known.items() if not isinstance(v, nn.Module)}
        return ", ".join(f"{key}={value!r}" for key, value in shown.items())


def _as_threshold(threshold: Any, count: int) -> float | tuple[float, ...]:
    """A number, or `count` of them.

    Raises:
        ValueError: nan, or another count. TypeError: no numbers.
    """
    several = threshold.tolist() if hasattr(threshold, "tolist") else threshold
    numbers = [*several] if isinstance(several, (list, tuple)) else [several]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(
                f"CascadeFusion: threshold must be a number, or one per stage but the last; got "
                f"{threshold!r}"
            )
        if number != number:
            raise ValueError(f"CascadeFusion: threshold must not be nan; got {threshold!r}")
    if not isinstance(several, (list, tuple)):
        return float(several)
    if len(numbers) != count:
        raise ValueError(
            f"CascadeFusion: threshold must be one number, or {count}, one per stage but the last; "
            f"got {len(numbers)}"
        )
    return tuple(map(float, numbers))


def _obey(exit: Any, num_stages: int, batch: Arguments) -> Decision:
    """Forced exits."""
    integers = (torch.int64, torch.int32)
    if isinstance(exit, bool) or not (
        isinstance(exit, int) or (isinstance(exit, Tensor) and exit.dtype in integers)
    ):
        got = exit.dtype if isinstance(exit, Tensor) else repr(exit)
        raise TypeError(f"exit must be an int or a LongTensor [N]; got {got}")
    choice, counts = forced(exit, "exit", num_stages, batch.num_rows, batch.device)
    batch.num_rows = choice.shape[0]
    if counts is not None:
        return Decision(TOP_ONE, choice, sorting.route_counted(choice, counts))
    plan = sorting.route_unless(choice.unsqueeze(1), choice < 0, num_stages)
    sorting.check_levels(plan, choice, "exit")
    return Decision(TOP_ONE, choice, plan)
