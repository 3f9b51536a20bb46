"""EnergyFusion: late fusion of whatever modalities a sample has, each weighted by its quality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import checks, energy_fuse, movement, sorting
from ..functional.filled import LEAST, fill
from ..functional.plan import RoutingPlan
from .arguments import Arguments
from .branch import Branch, Branches, as_branch, forward_only, part
from .calling import Callee, as_module, joined, parted
from .processes import ONE_UNIT, may_shard, refuse_sharded
from .routed.execution import run_rows
from .tracing import EXPORT, holds_ops, refuse_jit

Weighting = str | Callable[[list[Tensor]], Tensor]


class EnergyOutput(NamedTuple):
    """What `EnergyFusion` returns on request.

    Attributes:
        fused: [N, C].
        logits: of each encoder, [N, C], zeros where its modality is absent; a tuple, or a dict by
            name where the encoders were given as one.
        confidence: [N, M], with its gradient, for `quality_rank_loss`; 0 where absent.
        losses: [N, M + 1], the encoders' and that of `fused`, 0 where absent; None without targets.
    """

    fused: Tensor
    logits: tuple[Tensor, ...] | dict[str, Tensor]
    confidence: Tensor
    losses: Tensor | None


class EnergyFusion(nn.Module):
    """Sums the logits of M encoders, each weighted by its confidence (QMF, ICML 2023).

    An encoder runs on the samples that have its modality, and on no others; its BatchNorm sees
    those alone. Every parameter gets a gradient, zero where its encoder did not run.

    Args:
        encoders: modules or `Branch`es, a sequence or a dict by name; each returns logits [n, C]. A
            plain module reads its own modality: of one dict the entry of its name, else the
            argument at its position (a tuple is splatted). A Branch reads what it says.
        weights: "energy": 0.1 * logsumexp(logits), as published. "softmax": the softmax of that
            over the modalities present. "uniform": their mean, which is plain late fusion. Or a
            callable: gets the list of logits, returns weights [N, M] with whatever gradient they
            carry (PDF, TMC and their kind).
        scale: of the energy.
        detach_confidence: the weights "energy" and "softmax" are constants to the gradient of the
            fused logits, as in QMF's text-image code; its RGB-D code lets it through.
    """

    def __init__(
        self,
        encoders: Sequence[Callee] | Mapping[str, Callee] | nn.ModuleDict,
        *,
        weights: Weighting = "energy",
        scale: float = 0.1,
        detach_confidence: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(encoders, Iterable):
            raise TypeError(
                "EnergyFusion: encoders must be a sequence or a dict of modules; got "
                f"{type(encoders).__name__}"
            )
        self.named = isinstance(encoders, (Mapping, nn.ModuleDict))
        items: list[tuple[Any, Callee]] = (
            [*encoders.items()]
            if isinstance(encoders, (Mapping, nn.ModuleDict))
            else [*enumerate(encoders)]
        )
        if not items:
            raise ValueError("EnergyFusion: encoders is empty; give at least one module")
        if not callable(weights) and weights not in ("energy", "softmax", "uniform"):
            raise ValueError(
                "EnergyFusion: weights must be 'energy', 'softmax', 'uniform' or a callable; got "
                f"{weights!r}"
            )
        self.encoders = Branches(
            _as_encoder(module, position, str(name), len(items))
            for position, (name, module) in enumerate(items)
        )
        self.weights = weights
        self.scale = scale
        self.detach_confidence = detach_confidence

    def extra_repr(self) -> str:
        return f"weights={self.weights!r}, scale={self.scale}"

    def _slow_forward(self, *inputs: Any, **options: Any) -> Any:
        """What torch.jit.trace calls in place of `forward`."""
        if options.get("present") is not None:
            refuse_jit(self, EXPORT)
        return super()._slow_forward(*inputs, **options)

    def forward(
        self,
        *inputs: Any,
        targets: Tensor | None = None,
        present: Tensor | Mapping[str, Tensor] | None = None,
        return_details: bool = False,
        **named: Any,
    ) -> Tensor | EnergyOutput:
        """The fused logits [N, C].

        Args:
            inputs, named: as for `RoutedFusion`. Where the first thing that an encoder reads is
                None, its modality is absent for the whole batch.
            targets: as for `energy_fuse`; asks for details.
            present: which samples have which modality: bool [N, M], or a dict of bool [N] by the
                names of encoders, those not named being there. What is absent may hold anything.
            return_details: return an `EnergyOutput`.

        Raises:
            ValueError, TypeError: what does not fit; the message names the encoder.
        """
        batch = Arguments(joined(inputs, named), "EnergyFusion inputs")
        encoders = part(self, "encoders").all()
        given = [_is_given(encoder.arguments(batch).selected) for encoder in encoders]
        if not any(given):
            raise ValueError("EnergyFusion: every modality is None; give at least one")
        mask = None if present is None else _mask(present, batch, encoders)
        size = batch.num_rows if mask is None else mask.shape[0]
        if size is None:
            raise ValueError(
                "EnergyFusion: with Lazy inputs alone the number of samples is unknown; say which "
                "samples have which modality: present=bool [N, M]"
            )
        if not all(given):
            here = torch.tensor(given, device=batch.device)
            mask = here.expand(size, -1) if mask is None else mask & here
        if mask is not None and may_shard():
            refuse_sharded(self, encoders, ONE_UNIT)
        plan = None if present is None or mask is None else sorting.route(mask, len(encoders))
        blind = plan is not None and plan.traced and not holds_ops()
        logits = _encode(encoders, batch, given, None if blind else plan, size)
        if blind:  # all ran on every sample
            assert mask is not None
            logits = [torch.where(mask[:, m, None], own, 0) for m, own in enumerate(logits)]
        weights = self.weights if isinstance(self.weights, str) else self.weights(logits)
        fused, confidence, losses = energy_fuse(
            logits,
            targets,
            weights=weights,
            scale=self.scale,
            detach_confidence=self.detach_confidence,
            present=mask,
        )
        if targets is None and not return_details:
            return fused
        names = [encoder.name for encoder in encoders]
        each = dict(zip(names, logits, strict=True)) if self.named else tuple(logits)
        return EnergyOutput(fused, each, confidence, losses)


class _Own:
    """Selects the modality of one encoder: by name out of a dict, else by position."""

    def __init__(self, position: int, name: str, count: int) -> None:
        self.position, self.name, self.count = position, name, count

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        pack = named or (inputs[0] if len(inputs) == 1 else inputs)
        if isinstance(pack, Mapping):
            if self.name not in pack:
                raise ValueError(
                    f"encoder {self.name!r} reads modality {self.name!r}; the inputs have "
                    f"{', '.join(map(repr, pack))}; give None where it is absent"
                )
            return pack[self.name]
        if isinstance(pack, Tensor) or not isinstance(pack, (list, tuple)):
            pack = inputs
        if len(pack) != self.count:
            raise ValueError(
                f"EnergyFusion: wanted one input per encoder, {self.count}, or one dict; got "
                f"{len(pack)}; say which encoder reads what: Branch(encoder, inputs=...)"
            )
        return pack[self.position]

    def __repr__(self) -> str:
        return f"its own ({self.name!r})"


def _is_given(selected: tuple[Any, ...]) -> bool:
    given, named = parted(selected)
    return next(iter((*given, *named.values())), selected) is not None


def _as_encoder(module: Callee, position: int, name: str, count: int) -> Branch:
    module = as_module(module, f"encoder {name!r}")
    if not isinstance(module, Branch):
        module = Branch(module, _Own(position, name, count))
    return as_branch(module, name, f"encoder {name!r}")


def _mask(present: Any, batch: Arguments, encoders: Sequence[Branch]) -> Tensor:
    """`present` as bool [N, M]."""
    if isinstance(present, Mapping):
        names = [encoder.name for encoder in encoders]
        if not present or not {*present} <= {*names}:
            raise ValueError(
                f"EnergyFusion: present must name encoders, {', '.join(map(repr, names))}; got "
                f"{', '.join(map(repr, present)) or 'none'}"
            )
        columns = {name: _bool(column, f"present[{name!r}]") for name, column in present.items()}
        first = next(iter(columns.values()))
        if any(column.ndim != 1 or column.shape != first.shape for column in columns.values()):
            shapes = ", ".join(str(list(column.shape)) for column in columns.values())
            raise ValueError(f"EnergyFusion: present must hold bool [N] each; got {shapes}")
        everyone = torch.ones_like(first)
        present = torch.stack([columns.get(str(name), everyone) for name in names], 1)
    mask = _bool(present, "present")
    rows = mask.shape[0] if batch.num_rows is None and mask.ndim else batch.num_rows
    if list(mask.shape) != [rows, len(encoders)]:
        raise ValueError(
            f"EnergyFusion: present must be bool [N, M] = {[rows, len(encoders)]}; got "
            f"{list(mask.shape)}"
        )
    if batch.device is not None and mask.device != batch.device:
        raise ValueError(
            f"EnergyFusion: present must be on {batch.device}, as the inputs are; got {mask.device}"
        )
    return mask


def _bool(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"EnergyFusion: {name} must be a bool tensor; got {got}")
    return value


def _encode(
    encoders: Sequence[Branch],
    batch: Arguments,
    given: Sequence[bool],
    plan: RoutingPlan | None,
    size: int,
) -> list[Tensor]:
    """The logits [N, C] of every encoder; zeros for the samples without its modality."""
    if plan is not None and plan.traced:  # every encoder is called
        (plan,) = fill([plan], LEAST)
    counts = [size if one else 0 for one in given] if plan is None else plan.counts
    ran = [m for m, one in enumerate(given) if one and (counts[m] or not size)]
    if not ran:  # nobody has anything, and somebody must say how many classes there are
        first = encoders[given.index(True)]
        with forward_only([first]):
            like = _logits([first], [first.call_whole(batch, size)], [size])[0]
        return [_zeros(like, size, encoder, batch) for encoder in encoders]
    if plan is None:
        outputs = [encoders[m].call_whole(batch, size) for m in ran]
    else:
        outputs = run_rows(encoders, batch, plan, ran, {})
    own = _logits([encoders[m] for m in ran], outputs, [counts[m] for m in ran])
    rows = dict(zip(ran, own, strict=True))
    logits = []
    for m, encoder in enumerate(encoders):
        if m not in rows:
            logits.append(_zeros(own[0], size, encoder, batch))
        elif plan is None or (not plan.traced and counts[m] == size):
            logits.append(rows[m])
        else:
            logits.append(movement.combine_rows(plan, [rows[m]], [plan.starts[m]]))
    return logits


def _logits(
    encoders: Sequence[Branch], outputs: Sequence[Any], rows: Sequence[int]
) -> Sequence[Tensor]:
    """What encoders returned, in one dtype, after checking that it is logits."""
    for encoder, output in zip(encoders, outputs, strict=True):
        if not isinstance(output, Tensor) or output.ndim != 2:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{encoder.label} must return logits [n, C]; got {got}")
    labels = [encoder.label for encoder in encoders]
    columns, _ = checks.check_outputs(outputs, rows, labels, outputs[0].device)
    return movement.same_dtype(columns[0])


def _zeros(like: Tensor, size: int, encoder: Branch, batch: Arguments) -> Tensor:
    """Logits of an encoder that did not run, whose parameters get zero gradients."""
    zeros = like.new_zeros(size, like.shape[1])
    return movement.touch([zeros], encoder.read_from(batch))[0]
