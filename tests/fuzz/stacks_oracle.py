"""What `NestedFusion` and `ChainedFusion` are documented to compute, sample by sample."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compare import Skip
from .routed_oracle import TIE
from .stacks_model import Stack, Stage

Rows = list[Tensor]


@dataclass
class Answer:
    """The output and the stages wanted; what the routing should say.

    Attributes:
        depth: of every sample; None where everything runs softly.
        weights: [N, 1 + L], of the depths, with the straight-through gradient.
        keep: [N, L], of a chain.
        probs: [N, 1 + L], where one gate was asked.
        asked: samples that each gate of a chain was asked about.
    """

    outputs: list[Tensor]
    depth: Tensor | None
    weights: Tensor
    keep: Tensor | None = None
    probs: Tensor | None = None
    asked: int = 0


def squeeze_excite(part: nn.Module, x: Tensor) -> Tensor:
    down, up = part[0], part[2]
    hidden = (x.flatten(2).mean(2) if x.ndim > 2 else x) @ down.weight.T + down.bias
    scale = (hidden.relu() @ up.weight.T + up.bias).sigmoid()
    return x * scale.reshape(*scale.shape, *[1] * (x.ndim - 2))


def project(module: Any, main: Tensor, aux: Tensor) -> Tensor:
    both = torch.cat([main, aux], 1).movedim(1, -1)
    return (both @ module.project.weight.flatten(1).T + module.project.bias).movedim(-1, 1)


FORMULAS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "add": lambda module, main, aux: main + aux,
    "weighted": lambda module, main, aux: module.weights[0] * main + module.weights[1] * aux,
    "concat": project,
    "writes": lambda module, main, aux: main + aux,
    "se add": lambda module, main, aux: (
        squeeze_excite(module.excite_main, main) + squeeze_excite(module.excite_aux, aux)
    ),
}


def staged(part: Stage, rows: list[Any]) -> list[Any]:
    """The stage on every sample by itself; with train-mode BatchNorm on all that are there."""
    if part.kind == "batch norm" and part.module.training:
        present = [row for row in rows if row is not None]
        if not present:
            return rows
        parts = iter(part.module(torch.cat(present)).split([len(row) for row in present]))
        return [None if row is None else next(parts) for row in rows]
    return [
        None if row is None else part.module(row.clone() if part.in_place else row) for row in rows
    ]


def joined(part: Stage, main: Rows, aux: list[Any]) -> list[Any]:
    formula = FORMULAS.get(part.kind, lambda module, *streams: module(*streams))
    return [
        None if a is None else formula(part.module, m, a) for m, a in zip(main, aux, strict=True)
    ]


def blended(skip: Tensor, fuse: Tensor, main: Tensor, both: Tensor | None) -> Tensor:
    shape = (-1, *[1] * (main.ndim - 1))
    if both is None:
        return skip.reshape(shape) * main
    return skip.reshape(shape) * main + fuse.reshape(shape) * both


def chunks(stack: Stack) -> list[slice]:
    return [slice(n, n + 1) for n in range(stack.num_rows)] if stack.num_rows else [slice(0, 0)]


def answer(stack: Stack, routing: Any) -> Answer:
    samples = chunks(stack)
    streams = tuple([stream[rows] for rows in samples] for stream in stack.streams)
    return (chained if stack.chained else nested)(stack, routing, samples, *streams)


def forced_depth(stack: Stack, routing: Any, rows: slice) -> Tensor:
    if isinstance(stack.depth, int):
        return torch.full((len(range(stack.num_rows)[rows]),), stack.depth)
    return (routing.choice if isinstance(stack.depth, str) else stack.depth)[rows]


def fixed(weights: Tensor, hard: Tensor, gate_grad: str) -> Tensor:
    """Hard weights with the gradient that `gate_grad` gives them."""
    learns = weights - weights.detach()
    if gate_grad == "none":
        return hard
    return hard + (learns * hard if gate_grad == "selected" else learns)


def check_apart(logits: Tensor) -> None:
    gaps = -logits.sort(1, descending=True).values.diff(dim=1)[:, :1]
    if gaps.numel() and gaps.min() < TIE[logits.dtype]:
        raise Skip("near a tie")


def nested(stack: Stack, routing: Any, samples: list[slice], main: Rows, aux: Rows) -> Answer:
    steps = torch.arange(1, stack.length + 1)
    fuses, skips, depths, weights, all_probs = [], [], [], [], []
    for rows, m, a in zip(samples, main, aux, strict=True):
        if stack.uniform:
            count = len(m)
            probs = torch.full((count, 1 + stack.length), 1 / (1 + stack.length), dtype=stack.dtype)
            depth = None
        elif stack.forced:
            depth = forced_depth(stack, routing, rows)
            probs = nn.functional.one_hot(depth, 1 + stack.length).to(stack.dtype)
        else:
            logits = stack.gates[0](m, a)
            if stack.noisy:
                drawn = stack.fusion.temperature * routing.probs[rows].detach().log()
                logits = logits + drawn - logits.detach()
            check_apart(logits)
            depth, probs = logits.argmax(1), (logits / stack.fusion.temperature).softmax(1)
            all_probs.append(probs)
        soft = probs.flip(1).cumsum(1).flip(1)[:, 1:]  # [n, L]: sum of p_d over d >= k
        if stack.soft or stack.uniform:
            fuses.append(soft)
            skips.append(1 - soft)
            weights.append(probs)
            continue
        hard = (depth[:, None] >= steps).to(probs.dtype)
        one_hot = nn.functional.one_hot(depth, 1 + stack.length).to(probs.dtype)
        grad = "none" if stack.forced else stack.fusion.gate_grad
        fuses.append(fixed(soft, hard, grad))
        skips.append(fixed(1 - soft, 1 - hard, grad))
        weights.append(fixed(probs, one_hot, "none" if grad == "none" else "straight_through"))
        depths.append(depth)
    outputs = []
    for k in range(stack.length):
        if stack.subset:
            aux = [
                a if a is not None and bool(fuse.detach()[:, k].any()) else None
                for a, fuse in zip(aux, fuses, strict=True)
            ]
        main, aux = staged(stack.main[k], main), staged(stack.aux[k], aux)
        both = joined(stack.joins[k], main, aux)
        main = [
            blended(skip[:, k], fuse[:, k], m, f)
            for skip, fuse, m, f in zip(skips, fuses, main, both, strict=True)
        ]
        outputs.append(torch.cat(main))
    return Answer(
        [outputs[-1], *(outputs[k - 1] for k in stack.wanted)],
        torch.cat(depths) if depths else None,
        torch.cat(weights),
        probs=torch.cat(all_probs) if all_probs else None,
    )


def own_decision(stack: Stack, k: int, m: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of keeping, and the hard decision."""
    logits = stack.gates[k](m, a)
    check_apart(logits)
    probs = (logits / stack.fusion.temperature).softmax(1)[:, 1]
    return probs, logits.argmax(1).to(probs.dtype)


def chained(stack: Stack, routing: Any, samples: list[slice], main: Rows, aux: Rows) -> Answer:
    """As masked execution: a dropped sample goes on, with the weights it has."""
    keeps = [m.new_ones(len(m)) for m in main]
    through = [torch.zeros(len(m), dtype=torch.int64) for m in main]
    all_keeps: list[list[Tensor]] = [[] for _ in main]
    outputs, asked, unfused = [], 0, main
    last = max((k for k, rule in enumerate(stack.rules) if rule != "skip"), default=-1)
    grad = stack.fusion.gate_grad
    for k in range(stack.length):
        skips, hards = [], []
        for i, (rows, m, a) in enumerate(zip(samples, main, aux, strict=True)):
            before = keeps[i]
            if stack.uniform:
                keeps[i] = torch.full_like(before, 1 - (k + 1) / (stack.length + 1))
            elif stack.forced:
                keeps[i] = (forced_depth(stack, routing, rows) > k).to(before.dtype)
            elif stack.rules[k] == "dynamic" and a is not None:
                asked += int(before.detach().ne(0).sum())
                if stack.noisy:
                    own = routing.keep[rows, k].detach()
                    own = own if k == 0 or not stack.soft else own / before
                    keeps[i] = before * torch.where(before == 0, torch.ones_like(own), own)
                else:
                    read = unfused[i] if stack.gates_read == "stages" else m
                    probs, hard = own_decision(stack, k, read, a)
                    if not stack.soft:
                        probs = fixed(probs, hard, "none" if grad == "none" else "straight_through")
                    keeps[i] = before * probs
            skip = 1 - keeps[i]
            alive = keeps[i].detach() != 0
            if grad == "selected" and not stack.soft and not stack.forced:
                dropped_now = (before.detach() != 0) & ~alive
                skip = torch.where(dropped_now, skip, skip.detach())
            skips.append(skip)
            hards.append(alive)
            through[i] = through[i] + alive
            all_keeps[i].append(keeps[i])
        if stack.subset:
            aux = [a if h.any() else None for a, h in zip(aux, hards, strict=True)]
        main = unfused = staged(stack.main[k], main)
        if k <= last:
            aux = staged(stack.aux[k], aux)
        if stack.rules[k] != "skip":
            both = joined(stack.joins[k], main, aux)
            fuses = [
                torch.where(h, keep, keep.detach())
                if grad == "selected" and not stack.soft
                else keep
                for keep, h in zip(keeps, hards, strict=True)
            ]
            main = [
                blended(skip, fuse, m, f)
                for skip, fuse, m, f in zip(skips, fuses, main, both, strict=True)
            ]
        outputs.append(torch.cat(main))
    keep = torch.cat([torch.stack(column, 1) for column in all_keeps])
    ones = keep.new_ones(len(keep), 1)
    padded = torch.cat([ones, keep, 0 * ones], 1)
    return Answer(
        [outputs[-1], *(outputs[k - 1] for k in stack.wanted)],
        None if stack.soft or stack.uniform else torch.cat(through),
        -padded.diff(dim=1),
        keep,
        asked=asked,
    )
