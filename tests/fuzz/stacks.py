"""`NestedFusion` and `ChainedFusion` against the masked formulas, sample by sample."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmm_kernels import resource_loss

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
from .stacks_model import Stack, draw_stack
from .stacks_oracle import Answer, answer

NO_REFUSAL = contextlib.nullcontext()


def case(chained: bool, draw: Draw) -> None:
    stack = draw_stack(draw, chained)
    before = [stream.detach().clone() for stream in stack.streams]
    small = stack.num_rows * (2 if stack.streams[0].ndim > 2 else 1) < 2
    if small and stack.has_norms and stack.fusion.training:
        raise Skip("BatchNorm needs two values")
    if stack.has_norms and stack.fusion.training and "one row" in stack.layouts:
        raise Skip("BatchNorm divides rounding errors by a variance of zero")
    writes = any(part.kind == "writes" for part in stack.joins)
    if writes and stack.context.startswith("inference"):
        raise Skip("tensors of inference mode do not tell that they were written to")
    with refusals(stack):
        RUNS.get(stack.context, check_gradients)(stack)
    for name, stream, values in zip(("main", "aux"), stack.streams, before, strict=True):
        require(torch.equal(stream.detach(), values), f"{name} after the call", stream, values)


@contextlib.contextmanager
def refusals(stack: Stack):
    """What is refused whatever is asked of the stack."""
    with contextlib.ExitStack() as may:
        if stack.subset and stack.streams[0].ndim == 2:
            may.enter_context(may_refuse(ValueError, naming="Expected more than 1"))
        if any(part.kind == "writes" for part in stack.joins):
            if stack.context.startswith("inference"):
                raise Skip("tensors of inference mode do not tell that they were written to")
            may.enter_context(may_refuse(ValueError, naming="must not write"))
            may.enter_context(may_refuse(RuntimeError))
        yield


nested_case, chained_case = partial(case, False), partial(case, True)


def norms(stack: Stack) -> list[nn.Module]:
    return [part for part in stack.fusion.modules() if isinstance(part, nn.BatchNorm1d)]


def check_values(got: list[Tensor], right: Answer) -> None:
    require(len(got) == len(right.outputs), "outputs", len(got), len(right.outputs))
    for index, (mine, wanted) in enumerate(zip(got, right.outputs, strict=True)):
        same(f"output {index}", mine, wanted)


def check_routing(stack: Stack, routing: Any, right: Answer, recorded: bool) -> None:
    rows, length = stack.num_rows, stack.length
    require(routing.num_rows == rows, "num_rows", routing.num_rows, rows)
    if stack.uniform:
        return
    close("weights", routing.weights, right.weights)
    if stack.chained and not stack.forced:
        close("keep", routing.keep, right.keep)
    if right.probs is not None and not stack.chained:
        same("probs", routing.probs, right.probs)
    if right.depth is None:
        require(routing.choice is None, "choice when dense", routing.choice, None)
        return
    require(torch.equal(routing.choice, right.depth), "depths", routing.choice, right.depth)
    counts = tuple(right.depth.bincount(minlength=1 + length).tolist())
    require(routing.counts == counts, "counts", routing.counts, counts)
    check_costs(stack, routing, right, counts, recorded)


def check_costs(stack: Stack, routing: Any, right: Answer, counts: Any, recorded: bool) -> None:
    rows, length = stack.num_rows, stack.length
    last = max((k for k, rule in enumerate(stack.rules) if rule != "skip"), default=-1)
    deep = [sum(counts[k:]) if k - 1 <= last else 0 for k in range(1, 1 + length)]
    exact = (
        recorded and stack.fusion.gate_grad == "straight_through" and right.weights.requires_grad
    )
    own = stack.fusion.execution in ("routed", "auto") and not exact
    if own and not (stack.has_norms and stack.fusion.training):
        wanted = (rows, *deep)
        require(tuple(routing.rows_run) == wanted, "rows_run", routing.rows_run, wanted)
    if not stack.gate_cost or not rows:
        return
    main = sum(part.cost for part in stack.main)
    fuses = [rule != "skip" for rule in stack.rules]
    steps = [
        (a.cost if k <= last else 0.0) + (j.cost if fuses[k] else 0.0)
        for k, (a, j) in enumerate(zip(stack.aux, stack.joins, strict=True))
    ]
    costs = [main + sum(steps[:k]) for k in range(1 + length)]
    close("costs", torch.tensor(routing.costs), torch.tensor(costs), 1e-5)
    if own and not (stack.has_norms and stack.fusion.training):
        gate = 0.0 if stack.forced else stack.gate_cost
        if stack.chained:
            gate *= right.asked / rows
        executed = main + sum(n * c for n, c in zip(deep, steps, strict=True)) / rows + gate
        close("executed_cost", torch.tensor(routing.executed_cost), torch.tensor(executed), 1e-5)


def add_resource_loss(stack: Stack, routing: Any, right: Answer) -> tuple[Any, Any]:
    """The library's and ours, where both are differentiable in the same way."""
    learns = right.weights.requires_grad and stack.num_rows > 0 and not stack.uniform
    if not learns or not (stack.soft or stack.fusion.gate_grad == "straight_through"):
        return None, None
    costs = [float(k * k) for k in range(1 + stack.length)]
    wanted = (right.weights * torch.tensor(costs, dtype=stack.dtype)).sum(1).mean()
    got = resource_loss(routing, costs)
    close("resource_loss", got.to(wanted.dtype), wanted)
    return got, wanted


def differentiate(outputs: list[Tensor], grads: list[Tensor], extra: Any) -> None:
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    if extra is not None and extra.requires_grad:  # no gate was asked that learns: a constant
        pairs.append((extra, torch.ones_like(extra)))
    if pairs:
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])


def upstream(stack: Stack, outputs: list[Tensor]) -> list[Tensor]:
    layout = stack.draw.pick("layout of the gradient", LAYOUTS)
    return [laid_out(stack.draw.normal(*o.shape).to(o.dtype), layout) for o in outputs]


def check_gradients(stack: Stack) -> None:
    names, tensors = stack.learners()
    with same_statistics(norms(stack)) as oracle:
        got, routing = stack()
        right = oracle(lambda: answer(stack, routing))
    check_values(got, right)
    check_routing(stack, routing, right, recorded=True)
    grads = upstream(stack, right.outputs)
    mine, wanted = add_resource_loss(stack, routing, right)
    compare_gradients(stack, names, tensors, (got, mine), (right.outputs, wanted), grads)


def compare_gradients(stack, names, tensors, got, right, grads) -> None:
    differentiate(got[0], grads, got[1])
    mine = take_gradients(tensors)
    differentiate(right[0], grads, right[1])
    tolerance = {torch.float16: 2e-1, torch.bfloat16: 1.0}.get(stack.dtype)
    same_gradients("gradient", names, mine, take_gradients(tensors), tolerance)


def check_without_graph(stack: Stack) -> None:
    mode = torch.no_grad if stack.context == "no_grad" else torch.inference_mode
    with mode():
        if stack.context == "inference tensors":
            stack.streams = tuple(stream.clone() for stream in stack.streams)
        with same_statistics(norms(stack)) as oracle:
            got, routing = stack()
            right = oracle(lambda: answer(stack, routing))
        check_values(got, right)
        check_routing(stack, routing, right, recorded=False)


def check_checkpoint(stack: Stack) -> None:
    if stack.has_norms or stack.noisy or isinstance(stack.depth, str):
        raise Skip("recomputation draws and records again")
    names, tensors = stack.learners()
    routings = []

    def run(*streams: Tensor) -> list[Tensor]:
        outputs, routing = stack(*streams)
        routings.append(routing)
        return outputs

    got = checkpoint(run, *stack.streams, use_reentrant=False)
    right = answer(stack, routings[0])
    check_values(got, right)
    grads = upstream(stack, right.outputs)
    compare_gradients(stack, names, tensors, (got, None), (right.outputs, None), grads)


def curved(outputs: list[Tensor]) -> Tensor:
    return sum(((o.sin() + 0.5 * o.square()).sum() for o in outputs), torch.zeros(()))


def refuses_second_order(stack: Stack) -> contextlib.AbstractContextManager[None]:
    """By README those through a hard gate and through `SEAdd` may be refused."""
    gate = stack.fusion.gate_grad != "none" and not stack.forced and not stack.soft
    fused = any(part.kind == "se add" for part in stack.joins)
    return may_refuse(RuntimeError) if gate or fused else NO_REFUSAL


def check_second_order(stack: Stack) -> None:
    names, tensors = stack.learners()
    road = stack.draw.pick("road", ROADS)
    with same_statistics(norms(stack)) as oracle:
        got, routing = stack()
        right = oracle(lambda: answer(stack, routing))
    check_values(got, right)
    loss = curved(right.outputs)
    if not tensors or not loss.requires_grad:
        raise Skip("nothing to differentiate")
    wanted = second_derivatives(road, loss, tensors)
    take_gradients(tensors)
    if wanted is None:
        raise Skip("no second derivative")
    with refuses_second_order(stack):
        mine = second_derivatives(road, curved(got), tensors)
    take_gradients(tensors)
    mine = [None] * len(tensors) if mine is None else mine
    tolerance = 1e-5 if stack.has_norms else 1e-8
    same_gradients("second derivative", names, mine, wanted, tolerance, none_is_zero=True)


def check_forward_mode(stack: Stack) -> None:
    if stack.noisy or isinstance(stack.depth, str) or (stack.has_norms and stack.fusion.training):
        raise Skip("not a smooth function")
    _, routing = stack()
    main, aux = stack.streams
    point, along = main.detach().contiguous(), stack.draw.normal(*main.shape)

    def loop(point: Tensor) -> list[Tensor]:
        stack.streams = (point, aux)
        try:
            return answer(stack, routing).outputs
        finally:
            stack.streams = (main, aux)

    wanted = tangents(loop, point, along)
    with may_refuse(RuntimeError, NotImplementedError):
        mine = tangents(lambda point: stack(point, aux)[0], point, along)
    for index, (tangent, right) in enumerate(zip(mine, wanted, strict=True)):
        close(f"tangent of output {index}", tangent, right, TOLERANCE[torch.float64])


def check_autocast(stack: Stack) -> None:
    """Values against masked execution, both under autocast."""
    if stack.has_norms or isinstance(stack.depth, str) or stack.soft:
        raise Skip("another draw, or masked execution is another thing")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, routing = stack()
        stack.fusion.execution = "masked"
        masked, again = stack()
    if not torch.equal(routing.choice, again.choice):
        raise Skip("near a tie")
    for index, (mine, wanted) in enumerate(zip(got, masked, strict=True)):
        close(f"output {index}, against masked", mine.to(wanted.dtype), wanted, 5e-2)


RUNS: dict[str, Callable[[Stack], None]] = {
    "no_grad": check_without_graph,
    "inference": check_without_graph,
    "inference tensors": check_without_graph,
    "checkpoint": check_checkpoint,
    "second order": check_second_order,
    "forward mode": check_forward_mode,
    "autocast": check_autocast,
}
