"""What a result is checked against before it is timed: plain PyTorch in fp64.

Every row of a benchmark blends all experts' outputs in some way, and this file computes just that,
in slices of the batch so that fp64 fits where the timed row does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.baselines import Experts, Loss, straight_through, straight_through_selected
from benchmarks.workloads import PlannedGate

SLICE = 128  # samples


def _weighted(weigh: Callable[[Tensor], Tensor]) -> Callable[[Tensor, list[Tensor]], Tensor]:
    def blend(logits: Tensor, outputs: list[Tensor]) -> Tensor:
        return (weigh(logits).unsqueeze(2) * torch.stack(outputs, dim=1)).sum(dim=1)

    return blend


# What the rows of a benchmark compute: (logits, every expert's output) -> output.
BLENDS = {
    "masked": _weighted(straight_through),
    "selected": _weighted(straight_through_selected),
    "dense": _weighted(lambda logits: logits.softmax(dim=1)),
    "static_e1": lambda logits, outputs: outputs[0],
    "static_e2": lambda logits, outputs: outputs[1],
}

# The allowed error relative to the largest reference value: coarse, since this only decides
# whether a time is worth reporting. The rules of accuracy are in tests/.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}


def _slices(gate: PlannedGate, x: Any, n: int):
    for start in range(0, n, SLICE):
        part = slice(start, start + SLICE)
        planned = PlannedGate(gate.gate, gate.planned[part])
        yield part, planned, tree_map(lambda tensor, part=part: tensor[part], x)


def reference_outputs(gate: PlannedGate, experts: Experts, x: Any, n: int) -> dict[str, Tensor]:
    """The fp64 output for each kind of blend; eval mode, no graph."""
    outputs: dict[str, list[Tensor]] = {kind: [] for kind in BLENDS}
    with torch.no_grad():
        for _, planned, part_of_x in _slices(gate, x, n):
            logits = planned(part_of_x)
            every = [expert(part_of_x) for expert in experts.values()]
            for kind, blend in BLENDS.items():
                outputs[kind].append(blend(logits, every))
    return {kind: torch.cat(parts) for kind, parts in outputs.items()}


def gradient_vectors(gate: nn.Module, experts: Experts) -> dict[str, Tensor]:
    """All gradients of the gate and of each expert, each as one fp64 vector; None reads as zero."""

    def vector(module: nn.Module) -> Tensor:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        return torch.cat([gradient.double().flatten() for gradient in gradients])

    return {"gate": vector(gate)} | {name: vector(expert) for name, expert in experts.items()}


def reference_gradients(
    gate: PlannedGate, experts: Experts, x: Any, target: Tensor, loss: Loss
) -> dict[str, dict[str, Tensor]]:
    """The fp64 gradients of the mean loss, for each kind of blend."""
    modules = nn.ModuleList([gate, *experts.values()])
    parameters = list(modules.parameters())
    n = len(target)
    totals = {kind: [torch.zeros_like(p) for p in parameters] for kind in BLENDS}
    for part, planned, part_of_x in _slices(gate, x, n):
        logits = planned(part_of_x)
        every = [expert(part_of_x) for expert in experts.values()]
        share = len(target[part]) / n
        for kind, blend in BLENDS.items():
            gradients = torch.autograd.grad(
                share * loss(blend(logits, every), target[part]),
                parameters,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for total, gradient in zip(totals[kind], gradients, strict=True):
                total += gradient

    vectors = {}
    for kind, total in totals.items():
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        vectors[kind] = gradient_vectors(gate, experts)
    modules.zero_grad()
    return vectors


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The largest difference over the largest reference value; inf where shapes or values fail."""
    finite = bool(value.isfinite().all() and reference.isfinite().all())
    if value.shape != reference.shape or not finite:
        return float("inf")
    if value.numel() == 0:
        return 0.0
    reference = reference.double()
    scale = reference.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((value.double() - reference).abs().max() / scale)


def disagreement(values: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest relative error; inf where number or dtypes differ."""
    if [value.dtype for value in values] != [reference.dtype for reference in references]:
        return float("inf")
    return max(map(relative_error, values, references))
