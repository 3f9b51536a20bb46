"""A main stream, and an auxiliary one that is fused into it only as far as a sample needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import autograd, checks, sorting
from ...functional.plan import RoutingPlan
from ..branch import Branch
from ..decision import blend, forced, gumbel_like, one_hot, straight_through
from ..memory import apart, sharing
from ..routing import DepthRouting
from ..settings import Settings
from .prefix import Prefix
from .stage import Cell, Stage, make_stages


@dataclass
class Run:
    """One forward pass: what goes in, and what it leaves."""

    inputs: tuple[Tensor, Tensor]
    cells: list[Cell]
    wanted: set[int]  # stages whose output is read
    reports: bool  # whether a Routing is wanted
    outputs: dict[int, Tensor] = field(default_factory=dict)  # by stage, in sample order
    rows_run: list[int] = field(default_factory=list)
    depth: Tensor | None = None
    probs: Tensor | None = None
    plan: RoutingPlan | None = None
    keep: Tensor | None = None
    gate_cost: float = 0.0

    @property
    def num_rows(self) -> int:
        """N."""
        return self.inputs[0].shape[0]

    @property
    def reads_aux(self) -> bool:
        """Whether any cell needs the auxiliary stream."""
        return any(cell.reads for cell in self.cells)

    def routing(self) -> DepthRouting:
        """The decision and what it cost."""
        costs = None
        if all(cell.aux.cost is not None for cell in self.cells if cell.reads):
            costs = [sum(cell.main.cost or 0.0 for cell in self.cells)]
            for cell in self.cells:
                aux = (cell.aux.cost or 0.0) if cell.reads else 0.0
                costs.append(costs[-1] + aux + ((cell.fusion.cost or 0.0) if cell.fuses else 0.0))
        return DepthRouting(
            choice=self.depth,
            probs=self.probs,
            plan=self.plan,
            num_rows=self.num_rows,
            rows_run=tuple(self.rows_run),
            costs=None if costs is None else tuple(costs),
            gate_cost=self.gate_cost,
            keep=self.keep,
        )


class StackFusion(Settings):
    """What `NestedFusion` and `ChainedFusion` share: their stages, and how those run."""

    def __init__(
        self,
        main_stages: Iterable[nn.Module],
        aux_stages: Iterable[nn.Module],
        fusions: Iterable[nn.Module],
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
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
            generator: for the gate noise, and for random depths.

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
        run = Run((main, aux), self._cells(), {*stages, last}, return_routing)
        if depth is None:
            self._run_gated(run, generator)
        elif isinstance(depth, str) and depth == "uniform":
            shape = (main.shape[0], last + 1)
            dtype = torch.promote_types(main.dtype, torch.float32)
            probs = main.new_full(shape, 1 / (last + 1), dtype=dtype)
            run.probs = probs
            self._run_everywhere(run, lambda k, *_: skip_and_fuse(probs, k), soft=True)
        else:
            run.depth = forced(depth, "depth", last + 1, main.shape[0], main.device, generator)
            run.plan = sorting.route_descending(run.depth, last + 1)
            sorting.check_levels(run.plan, run.depth, "depth")
            self._run_to_depth(run, run.depth, run.plan)
        result: Any = run.outputs[last]
        if stages:
            result = result, [run.outputs[k] for k in stages]
        return (result, run.routing()) if return_routing else result

    def _run_gated(self, run: Run, generator: torch.Generator | None) -> None:
        raise NotImplementedError

    def _run_to_depth(
        self, run: Run, depth: Tensor, plan: RoutingPlan, probs: Tensor | None = None
    ) -> None:
        """Each sample as deep as `depth` says; `plan` has sorted them, the deepest first.

        `probs` [N, 1 + L]: of the gate, where it learns.
        """
        last = len(run.cells)
        if self._runs_masked(run):
            weights = one_hot(depth, last + 1, torch.float32)
            if probs is not None:
                weights = straight_through(depth, probs)

            def weigh(k: int, main: Tensor, aux: Tensor) -> Tensor:
                pair = skip_and_fuse(weights, k)
                return hide_unselected(pair) if self.gate_grad == "selected" else pair

            self._run_everywhere(run, weigh)
            return
        exact = probs is not None and self.gate_grad == "straight_through"
        starts = plan.host_header  # in front of starts[i]: the samples of depth > last - i
        prefix = Prefix(run.inputs, run.reads_aux)
        probs = prefix.sort_by_depth(plan, starts[last], exact, probs)
        for k, cell in enumerate(run.cells, start=1):
            prefix.narrow(starts[last + 1 - k], exact)
            prefix.step(cell, None if probs is None else skip_and_fuse(probs, k), exact)
            if k in run.wanted:
                run.outputs[k] = prefix.read()
        run.rows_run = prefix.rows_run

    def _run_everywhere(
        self, run: Run, weigh: Callable[[int, Tensor, Tensor], Tensor], soft: bool = False
    ) -> None:
        """Every cell on every sample, weighted: what DynMM's own code does.

        `weigh(k, main, aux)`: [N, 2], the weights of skipping and of fusing in cell k, out of what
        the cell before it returned.
        """
        main, aux = run.inputs
        lent: list[Tensor] = []  # outputs that the caller reads
        seen: list[Tensor] = []  # what a gate or a fusion may keep for its backward pass
        run.rows_run = [run.num_rows]
        for k, cell in enumerate(run.cells, start=1):
            weights = weigh(k, main, aux)
            if torch.is_grad_enabled() and self._gate_reads(k):
                seen += [main, aux]
            held = [*run.inputs, *lent, *seen]
            main = cell.main.run(cell.main.spare(main, [*held, aux]), read=[*run.inputs, *lent])
            if cell.reads:
                aux = cell.aux.run(cell.aux.spare(aux, [*held, main]), read=run.inputs)
            seen = sharing(seen, [main, aux])
            if cell.fuses:
                seen += [main, aux] if torch.is_grad_enabled() else []
                main = blend((main, cell.fuse(main, aux)), weights, soft)
            run.rows_run.append(run.num_rows if cell.reads else 0)
            if k in run.wanted:
                lent.append(main)
                run.outputs[k] = apart(main, run.inputs)

    def _gate_reads(self, k: int) -> bool:
        """Whether a gate reads what cell k starts from."""
        return False

    def _runs_masked(self, run: Run) -> bool:
        if self.execution == "masked" or not run.num_rows:
            return True
        return self.batch_norm == "masked" and any(cell.couples_samples() for cell in run.cells)

    def _ask(
        self,
        gate: Branch,
        main: Tensor,
        aux: Tensor,
        num_columns: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Logits [n, C], with noise where that is wanted."""
        logits = gate.call_reading((main, aux), gate.select((main, aux)))
        checks.check_logits(logits, main.shape[0], num_columns, main.device, f"{gate.name}")
        if self.draws:
            return logits + gumbel_like(logits, generator)
        return logits

    def _learns(self, logits: Tensor) -> bool:
        return self.gate_grad != "none" and autograd.is_followed(logits)

    def _cells(self) -> list[Cell]:
        groups: list[list[Stage]] = [
            list(group._modules.values())  # type: ignore[arg-type]
            for group in (self.main_stages, self.aux_stages, self.fusions)
        ]
        return [Cell(*stages) for stages in zip(*groups, strict=True)]

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


def skip_and_fuse(weights: Tensor, k: int) -> Tensor:
    """[N, 2]: out of the weights [N, 1 + L] of all depths, those of the ones before k and after."""
    return torch.stack([weights[:, :k].sum(1), weights[:, k:].sum(1)], 1)


def hide_unselected(pair: Tensor) -> Tensor:
    """The same values; only the weights that are not zero keep their gradient."""
    return torch.where(pair.detach() == 0, 0, pair)
