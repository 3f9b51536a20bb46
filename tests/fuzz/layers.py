"""`SkipLayer` and `EarlyExit` against their masked formulas, sample by sample."""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .compare import (
    ROADS,
    TOLERANCE,
    Skip,
    close,
    may_refuse,
    require,
    same,
    same_gradients,
    same_statistics,
    second_derivatives,
    take_gradients,
    tangents,
)
from .draw import LAYOUTS, Draw, laid_out
from .layers_model import Stream, draw_stream
from .stacks_model import Stage
from .stacks_oracle import check_apart, fixed


def case(exits: bool, draw: Draw) -> None:
    stream = draw_stream(draw, exits)
    before = stream.x.detach().clone()
    if stream.has_norms and (stream.x.ndim > 2 or len(stream.x) < 2):
        raise Skip("BatchNorm needs two values of features")
    if stream.has_norms and draw.features["layout of x"] == "one row":
        raise Skip("BatchNorm divides rounding errors by a variance of zero")
    refused: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if stream.subset:
        refused = may_refuse(ValueError, naming="Expected more than 1")
    with refused:
        RUNS[stream.context](stream)
    require(torch.equal(stream.x.detach(), before), "x after the call", stream.x, before)


skip_case, exit_case = partial(case, False), partial(case, True)


def chunks(tensor: Tensor) -> list[Tensor]:
    """Every sample by itself, or the batch where there is none."""
    return [*tensor.split(1)] if len(tensor) else [tensor]


def layered(
    stream: Stream, part: Stage, rows: list[Tensor | None], running: list[bool]
) -> list[Tensor | None]:
    """What the layer makes of each sample; of those that do not run None, if BatchNorm may tell."""
    if stream.subset:
        rows = [row if runs else None for row, runs in zip(rows, running, strict=True)]
    scales = [None] * len(rows) if stream.scale is None else chunks(stream.scale)

    def scaled(y: Tensor, scale: Tensor | None) -> Tensor:
        return y if scale is None else y * scale.view(-1, *[1] * (y.ndim - 1))

    if part.kind == "batch norm" and part.module.training:
        present = [row for row in rows if row is not None]
        if not present:
            return rows
        done = iter(part.module(torch.cat(present)).split([len(row) for row in present]))
        return [
            None if row is None else scaled(next(done), scale)
            for row, scale in zip(rows, scales, strict=True)
        ]
    return [
        None if row is None else scaled(part.module(row.clone() if part.in_place else row), scale)
        for row, scale in zip(rows, scales, strict=True)
    ]


def decided(stream: Stream, gate: nn.Module, x: Tensor, routing: object, n: slice) -> Tensor:
    """[n, B]: weights with the gradient they are to have."""
    logits = gate(x)
    temperature = stream.settings.temperature
    if stream.noisy:
        drawn = temperature * routing.probs[n].detach().log()  # type: ignore[attr-defined]
        logits = logits + drawn - logits.detach()
    check_apart(logits)
    probs = (logits / temperature).softmax(1)
    if stream.soft:
        return probs
    hard = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(probs.dtype)
    return fixed(probs, hard, stream.settings.gate_grad)


def rows_of(stream: Stream) -> list[slice]:
    size = len(stream.x)
    return [slice(n, n + 1) for n in range(size)] if size else [slice(0, 0)]


def weigh(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.reshape(-1, *[1] * (rows.ndim - 1)) * rows


def skipped(stream: Stream, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the weights [N, 2] of every layer."""
    samples, all_weights = chunks(x), []
    for k, part in enumerate(stream.layers):
        weights = []
        for rows, own in zip(rows_of(stream), samples, strict=True):
            if stream.told is None:
                weights.append(decided(stream, stream.gates[k], own, stream.routings[k], rows))
                continue
            keep = stream.told[k]
            if isinstance(keep, bool):
                keep = torch.full((len(x),), keep)
            keep = keep[rows].to(own.dtype)
            both = torch.stack([1 - keep, keep], 1)
            learns = stream.settings.gate_grad if keep.requires_grad else "none"
            weights.append(fixed(both, both.detach(), learns))
        running = [bool(weight.detach()[:, 1].any()) for weight in weights]
        done = layered(stream, part, [*samples], running)
        samples = [
            weigh(w[:, 0], own) if y is None else weigh(w[:, 0], own) + weigh(w[:, 1], y)
            for w, own, y in zip(weights, samples, done, strict=True)
        ]
        all_weights.append(torch.cat(weights))
    return torch.cat(samples), all_weights


def left(stream: Stream, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the weights [N, 1 + L] of the depths."""
    count, weights = 1 + len(stream.layers), []
    for rows, own in zip(rows_of(stream), chunks(x), strict=True):
        if stream.uniform:
            weights.append(torch.full((len(own), count), 1 / count, dtype=x.dtype))
        elif stream.told is None:
            weights.append(decided(stream, stream.gates[0], own, stream.routings[0], rows))
        else:
            depth = stream.routings[0].choice if isinstance(stream.told, str) else stream.told
            if isinstance(depth, int):
                depth = torch.full((len(x),), depth)
            weights.append(nn.functional.one_hot(depth[rows], count).to(x.dtype))
    each = len(stream.heads) > 1
    samples, totals = chunks(x), []
    for d in range(count):
        if d:
            running = [bool(weight.detach()[:, d:].any()) for weight in weights]
            samples = layered(stream, stream.layers[d - 1], samples, running)
        for i, (weight, rows) in enumerate(zip(weights, samples, strict=True)):
            if rows is None:
                continue
            term = weigh(weight[:, d], stream.heads[d](rows.clone()) if each else rows)
            if d:
                totals[i] = totals[i] + term
            else:
                totals.append(term)
    result = torch.cat(totals)
    return stream.heads[0](result) if len(stream.heads) == 1 else result, [torch.cat(weights)]


def answer(stream: Stream, x: Tensor | None = None) -> Tensor:
    exits = not isinstance(stream.module, nn.ModuleList)
    right, weights = (left if exits else skipped)(stream, stream.x if x is None else x)
    for routing, wanted in zip(stream.routings, weights, strict=True):
        check_routing(stream, routing, wanted, exits)
    return right


def check_routing(stream: Stream, routing: object, wanted: Tensor, exits: bool) -> None:
    if stream.soft:
        return
    choice = wanted.detach().argmax(1)
    require(torch.equal(routing.choice, choice), "choice", routing.choice, choice)
    counts = tuple(choice.bincount(minlength=wanted.shape[1]).tolist())
    require(routing.counts == counts, "counts", routing.counts, counts)
    close("weights", routing.weights.to(wanted.dtype), wanted)
    followed = wanted.requires_grad or stream.context == "forward mode"
    exact = followed and stream.settings.gate_grad == "straight_through"
    routed = stream.settings.execution == "routed" and not stream.has_norms
    if routed and len(stream.x) and not exact:
        alive = [sum(counts[d:]) for d in range(len(counts))]
        rows = tuple(alive) if exits else counts
        require(routing.rows_run == rows, "rows_run", routing.rows_run, rows)
    if routing.costs is None:
        require(not stream.draw.features["costs"], "costs", None, "some")


def norms(stream: Stream) -> list[nn.Module]:
    return [part for part in stream.module.modules() if isinstance(part, nn.BatchNorm1d)]


def check_gradients(stream: Stream) -> None:
    names, tensors = stream.learners()
    with same_statistics(norms(stream)) as oracle:
        got = stream()
        right = oracle(lambda: answer(stream))
    same("output", got, right)
    layout = stream.draw.pick("layout of the gradient", LAYOUTS)
    grad = laid_out(stream.draw.normal(*right.shape).to(right.dtype), layout)
    mine, wanted = differentiate(got, grad, tensors), differentiate(right, grad, tensors)
    tolerance = {torch.float16: 2e-1, torch.bfloat16: 1.0}.get(right.dtype)
    same_gradients("gradient", names, mine, wanted, tolerance)


def differentiate(output: Tensor, grad: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    if output.requires_grad:
        output.backward(grad)
    return take_gradients(tensors)


def check_without_graph(stream: Stream) -> None:
    mode = torch.no_grad if stream.context == "no_grad" else torch.inference_mode
    with mode(), same_statistics(norms(stream)) as oracle:
        got = stream()
        right = oracle(lambda: answer(stream))
    same("output", got, right)


def check_second_order(stream: Stream) -> None:
    names, tensors = stream.learners()
    road = stream.draw.pick("road", ROADS)
    with same_statistics(norms(stream)) as oracle:
        got = stream()
        right = oracle(lambda: answer(stream))
    same("output", got, right)
    losses = [(y.sin() + 0.5 * y.square()).sum() for y in (right, got)]
    if not tensors or not losses[0].requires_grad:
        raise Skip("nothing to differentiate")
    wanted = second_derivatives(road, losses[0], tensors)
    take_gradients(tensors)
    if wanted is None:
        raise Skip("no second derivative")
    exact = stream.settings.gate_grad == "straight_through" and not stream.soft
    with may_refuse(RuntimeError) if exact else contextlib.nullcontext():
        mine = second_derivatives(road, losses[1], tensors)
    take_gradients(tensors)
    mine = [None] * len(tensors) if mine is None else mine
    tolerance = 1e-5 if stream.has_norms else 1e-8
    same_gradients("second derivative", names, mine, wanted, tolerance, none_is_zero=True)


def check_forward_mode(stream: Stream) -> None:
    if stream.noisy or isinstance(stream.told, str) or stream.has_norms:
        raise Skip("not a smooth function")
    stream()
    point, along = stream.x.detach().contiguous(), stream.draw.normal(*stream.x.shape)
    wanted = tangents(lambda x: [answer(stream, x)], point, along)
    mine = tangents(lambda x: [stream(x)], point, along)
    close("tangent", mine[0], wanted[0], TOLERANCE[torch.float64])


RUNS: dict[str, Callable[[Stream], None]] = {
    "gradients": check_gradients,
    "no_grad": check_without_graph,
    "inference": check_without_graph,
    "second order": check_second_order,
    "forward mode": check_forward_mode,
}
