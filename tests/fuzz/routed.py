"""`RoutedFusion` against the loop over samples."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynmm_kernels import resource_loss

from .compare import (
    ROADS,
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
from .routed_checks import check_hooks, check_routing, check_values, learns, weighted
from .routed_model import Model, draw_model
from .routed_oracle import Answer, answer, subset_statistics
from .trees import flat, mapped, tensors_of


def case(draw: Draw) -> None:
    model = draw_model(draw)
    tensors = [leaf for leaf in model.leaves if leaf.tensor is not None]
    before = [leaf.tensor.detach().clone() for leaf in tensors]
    writes = any(reader.writes for reader in model.branches)
    if writes and model.context == "inference tensors":
        raise Skip("tensors of inference mode do not tell that they were written to")
    if writes and draw.features.get("fetch") == "the store itself":
        raise Skip("who fetches a store itself must not write into it")
    run = RUNS.get(model.context, check_gradients) if model.fault == "none" else check_fault
    with refuses_writes(model):
        run(model)
    for leaf, values in zip(tensors, before, strict=True):
        unchanged = torch.equal(leaf.tensor.detach(), values)
        require(unchanged, f"{leaf.role} input after the call", leaf.tensor, values)


@contextlib.contextmanager
def refuses_writes(model: Model):
    """A branch that writes into what others read: ours to refuse, or torch's."""
    if not any(reader.writes for reader in model.branches):
        yield
        return
    if model.context.startswith("inference"):
        raise Skip("tensors of inference mode do not tell that they were written to")
    with may_refuse(ValueError, naming="must not write"), may_refuse(RuntimeError):
        yield


def check_fault(model: Model) -> None:
    """An output that does not fit is refused by name, as soon as its branch runs with others."""
    label = model.fusion.branches[-1].label
    with may_refuse(ValueError, TypeError, naming=label):
        _, routing = model()
        fits_alone = model.fault not in ("a row less", "no rows")
        others = any(routing.rows_run[:-1])
        # A branch with BatchNorm runs for its statistics even where nobody chose it.
        unused = model.branches[-1].batch_norm and not routing.counts[-1]
        fine = not routing.rows_run[-1] or (fits_alone and (unused or not others))
        require(fine, f"output that is {model.fault}", "no error", "one that names the branch")


def run_library(model: Model) -> tuple[list[Any], Any]:
    """Leaves of the output, and the routing; refusals that are documented raise `Refused`."""
    with contextlib.ExitStack() as stack:
        if model.integral and weighted(model):
            stack.enter_context(may_refuse(TypeError))
        output, routing = model()
    return list(flat(output)), routing


def norms(model: Model) -> list[nn.Module]:
    return [norm for reader in model.branches for norm in reader.norms()]


def upstream(model: Model, leaves: list[Any]) -> tuple[list[int], list[Tensor]]:
    """Which outputs the loss uses, and their gradients, in any layout."""
    usable = [i for i, leaf in enumerate(leaves) if learns(leaf)]
    used = model.draw.pick("loss of", {"all": 3, "first": 1, "last": 1})
    usable = {"all": usable, "first": usable[:1], "last": usable[-1:]}[used]
    layout = model.draw.pick("layout of the gradient", LAYOUTS)
    grads = []
    for index in usable:
        leaf = leaves[index]
        values = model.draw.normal(*leaf.shape)
        values = torch.complex(values, 0.5 * values) if leaf.is_complex() else values
        values = values.to(leaf.dtype)
        grads.append(laid_out(values, layout) if leaf.ndim else values)
    return usable, grads


def differentiate(
    leaves: list[Any], used: list[int], grads: list[Tensor], extra: Any = None
) -> None:
    pairs = [(leaves[i], g) for i, g in zip(used, grads, strict=True) if leaves[i].requires_grad]
    if extra is not None:
        pairs.append((extra, torch.ones_like(extra)))
    if pairs:
        torch.autograd.backward([leaf for leaf, _ in pairs], [grad for _, grad in pairs])


def check_gradients(model: Model) -> None:
    names, tensors = model.learners()
    with same_statistics(norms(model)) as oracle:
        got, routing = run_library(model)
        right = oracle(lambda: answer(model, routing, record_all=True))
    check_values(model, got, right)
    check_routing(model, routing, right, recorded=True)
    check_hooks(model, routing)
    for index, (mine, leaf) in enumerate(zip(got, right.leaves, strict=True)):
        if learns(leaf) and not subset_statistics(model):
            require(
                mine.requires_grad == leaf.requires_grad, f"output {index} has a graph",
                mine.requires_grad, leaf.requires_grad,
            )  # fmt: skip
    used, grads = upstream(model, right.leaves)
    mine, wanted = resource_losses(model, routing, right)
    differentiate(got, used, grads, mine)
    mine = take_gradients(tensors)
    differentiate(right.leaves, used, grads, wanted)
    same_gradients("gradient", names, mine, take_gradients(tensors), gradient_tolerance(model))


def resource_losses(model: Model, routing: Any, right: Answer) -> tuple[Any, Any]:
    """The library's and ours, where `Routing.weights` is documented to have this gradient."""
    learns = (
        model.num_rows and right.weights.requires_grad and model.draw.pick("minds cost", (0, 1))
    )
    soft = model.fusion.execution == "dense" or model.fusion.gate_grad == "straight_through"
    if not learns or not soft:
        return None, None
    costs = [1.0 + 2 * index for index in range(len(model.branches))]
    wanted = (right.weights * torch.tensor(costs, dtype=model.dtype)).sum(1).mean()
    got = resource_loss(routing, costs)
    close("resource_loss", got.to(wanted.dtype), wanted)
    return got, wanted


def gradient_tolerance(model: Model) -> float | None:
    """Half precision adds up the rounding of every product on the way."""
    return {torch.float16: 1e-1, torch.bfloat16: 5e-1}.get(model.dtype)


def check_without_graph(model: Model) -> None:
    modes = {"no_grad": torch.no_grad}.get(model.context, torch.inference_mode)
    with modes():
        if model.context == "inference tensors":
            for leaf in model.leaves:
                if leaf.has_rows and leaf.role != "lazy":
                    leaf.tensor = leaf.value = leaf.tensor.clone()
        with same_statistics(norms(model)) as oracle:
            got, routing = run_library(model)
            right = oracle(lambda: answer(model, routing, record_all=False))
        check_values(model, got, right)
        check_routing(model, routing, right, recorded=False)
        check_hooks(model, routing)
        if model.draw.features["generator"] and routing.choice is not None:
            _, again = model()
            require(torch.equal(again.choice, routing.choice), "the same draws", again, routing)
        for leaf in tensors_of(got):
            require(leaf.grad_fn is None, "graph without gradients", leaf.grad_fn, None)


def check_checkpoint(model: Model) -> None:
    if any(reader.batch_norm for reader in model.branches) or model.noisy:
        raise Skip("recomputation records statistics twice")
    if isinstance(model.choice, str) or model.integral:
        raise Skip("random numbers are drawn again")
    names, tensors = model.learners()
    routings = []

    def run(*values: Any) -> list[Any]:
        output, routing = model(*values)
        routings.append(routing)
        return list(flat(output))

    got = checkpoint(run, *model.values(), use_reentrant=False)
    right = answer(model, routings[0], record_all=True)
    check_values(model, got, right)
    used, grads = upstream(model, right.leaves)
    differentiate(got, used, grads)
    mine = take_gradients(tensors)
    differentiate(right.leaves, used, grads)
    same_gradients("gradient", names, mine, take_gradients(tensors))


def check_autocast(model: Model) -> None:
    """Values against masked execution and against the loop, both under autocast."""
    if any(reader.batch_norm for reader in model.branches):
        raise Skip("statistics are recorded twice")
    graph = torch.no_grad() if model.draw.pick("autocast", (True, False)) else torch.enable_grad()
    with graph, torch.autocast("cpu", torch.bfloat16):
        got, routing = run_library(model)
        if not isinstance(model.choice, str) and not model.noisy:
            chosen, model.fusion.execution = model.fusion.execution, "masked"
            masked, _ = run_library(model)
            model.fusion.execution = chosen
            if chosen != "dense":
                for index, (mine, leaf) in enumerate(zip(got, masked, strict=True)):
                    if isinstance(leaf, Tensor):
                        same(f"output {index}, against masked", mine, leaf, 5e-2)
        right = answer(model, routing, record_all=True)
    for index, (mine, leaf) in enumerate(zip(got, right.leaves, strict=True)):
        if isinstance(leaf, Tensor):
            close(f"output {index}", mine.to(leaf.dtype), leaf, 1e-1)


def curved(leaves: list[Any]) -> Tensor | None:
    """A scalar of all outputs whose own second derivative is not zero."""
    total: Any = None
    for leaf in leaves:
        if learns(leaf):
            real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            slope = torch.linspace(0.5, 1.5, real.numel(), dtype=real.dtype).view(real.shape)
            term = (real * slope).sum() + 0.5 * real.square().sum()
            total = term if total is None else total + term
    return total


def refuses_second_order(model: Model) -> contextlib.AbstractContextManager[None]:
    """The gate's second derivatives may be refused, by README; all others are exact."""
    learning = model.fusion.gate_grad != "none" and model.choice is None
    refusing = learning and model.fusion.execution != "dense"
    return may_refuse(RuntimeError) if refusing else contextlib.nullcontext()


def check_second_order(model: Model) -> None:
    names, tensors = model.learners()
    road = model.draw.pick("road", ROADS)
    with same_statistics(norms(model)) as oracle:
        got, routing = run_library(model)
        right = oracle(lambda: answer(model, routing, record_all=True))
    loss, right_loss = curved(got), curved(right.leaves)
    if not tensors or right_loss is None or not right_loss.requires_grad:
        raise Skip("nothing to differentiate")
    wanted = second_derivatives(road, right_loss, tensors)
    take_gradients(tensors)
    if wanted is None:
        raise Skip("no second derivative")
    with refuses_second_order(model):
        mine = second_derivatives(road, loss, tensors)
    take_gradients(tensors)
    mine = [None] * len(tensors) if mine is None else mine
    tolerance = 1e-5 if norms(model) else 1e-8
    same_gradients("second derivative", names, mine, wanted, tolerance, none_is_zero=True)


def along_first_input(model: Model) -> tuple[Callable[[Tensor], Any], Callable, Tensor]:
    """The library and the loop as functions of the first input; noise and BatchNorm left out."""
    if model.noisy or isinstance(model.choice, str) or model.integral:
        raise Skip("not a smooth function")
    first = model.leaves[0]
    _, routing = model()
    if any(reader.batch_norm for reader in model.branches) and model.fusion.training:
        raise Skip("statistics")

    def library(point: Tensor) -> list[Tensor]:
        values = mapped(lambda leaf: point if leaf is first else leaf.value, model.arguments)
        return [leaf for leaf in flat(model(*values)[0]) if learns(leaf)]

    def loop(point: Tensor) -> list[Tensor]:
        kept, first.tensor = first.tensor, point
        try:
            return [leaf for leaf in answer(model, routing, True).leaves if learns(leaf)]
        finally:
            first.tensor = kept

    return library, loop, first.tensor.detach().contiguous()


def check_hvp(model: Model) -> None:
    library, loop, point = along_first_input(model)
    along = model.draw.normal(*point.shape)

    def product(function: Callable[[Tensor], list[Tensor]]) -> Tensor:
        def scalar(x: Tensor) -> Tensor:
            return curved(function(x)) + 0.0 * x.sum()

        return torch.autograd.functional.hvp(scalar, point, along)[1]

    wanted = product(loop)
    with refuses_second_order(model):
        mine = product(library)
    take_gradients(model.learners()[1])
    same("hvp", mine, wanted, 1e-8)


def check_forward_mode(model: Model) -> None:
    library, loop, point = along_first_input(model)
    along = model.draw.normal(*point.shape)
    wanted = tangents(loop, point, along)
    with may_refuse(RuntimeError, NotImplementedError):
        mine = tangents(library, point, along)
    for index, (tangent, right) in enumerate(zip(mine, wanted, strict=True)):
        same(f"tangent of output {index}", tangent, right)


RUNS: dict[str, Callable[[Model], None]] = {
    "no_grad": check_without_graph,
    "inference": check_without_graph,
    "inference tensors": check_without_graph,
    "checkpoint": check_checkpoint,
    "autocast": check_autocast,
    "second order": check_second_order,
    "hvp": check_hvp,
    "forward mode": check_forward_mode,
}
