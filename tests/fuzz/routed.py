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
from .routed_model import Model, draw_model
from .routed_oracle import Answer, answer, subset_statistics
from .trees import flat, mapped, tensors_of


def case(draw: Draw) -> None:
    model = draw_model(draw)
    tensors = [leaf for leaf in model.leaves if leaf.tensor is not None]
    before = [leaf.tensor.detach().clone() for leaf in tensors]
    if model.fault != "none":
        check_fault(model)
    else:
        with refuses_writes(model):
            RUNS.get(model.context, check_gradients)(model)
    for leaf, values in zip(tensors, before, strict=True):
        unchanged = torch.equal(leaf.tensor.detach(), values)
        require(unchanged, f"{leaf.role} input after the call", leaf.tensor, values)


@contextlib.contextmanager
def refuses_writes(model: Model):
    """A branch that writes into what others read: ours to refuse, or torch's."""
    if not any(reader.writes for reader in model.branches):
        yield
        return
    with (
        may_refuse(ValueError, naming="must not write"),
        may_refuse(RuntimeError),
    ):
        yield


def check_fault(model: Model) -> None:
    """An output that does not fit is refused by name, as soon as its branch runs with others."""
    label = model.fusion.branches[-1].label
    with may_refuse(ValueError, TypeError, naming=label):
        _, routing = model()
        fits_alone = model.fault in ("wider", "another structure", "on another device")
        others = any(routing.rows_run[:-1])
        fine = not routing.rows_run[-1] or (fits_alone and not others)
        require(fine, f"output that is {model.fault}", "no error", "one that names the branch")


def learns(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def weighted(model: Model) -> bool:
    """Whether outputs are multiplied by what need not be 0 or 1, or summed."""
    if model.choice is not None:
        return isinstance(model.choice, str) and model.choice == "uniform"
    return model.fusion.execution == "dense" or model.fusion.select != 1


def run_library(model: Model) -> tuple[list[Any], Any]:
    """Leaves of the output, and the routing; refusals that are documented raise `Refused`."""
    with contextlib.ExitStack() as stack:
        if model.integral and weighted(model):
            stack.enter_context(may_refuse(TypeError))
        output, routing = model()
    return list(flat(output)), routing


def check_values(model: Model, got: list[Any], right: Answer) -> None:
    require(len(got) == len(right.leaves), "leaves of the output", len(got), len(right.leaves))
    for index, (mine, leaf) in enumerate(zip(got, right.leaves, strict=True)):
        if not isinstance(leaf, Tensor):
            require(mine == leaf, f"output {index}", mine, leaf)
        elif learns(leaf) or not weighted(model):
            same(f"output {index}", mine, leaf)


def check_routing(model: Model, routing: Any, right: Answer, recorded: bool) -> None:
    fusion, rows, count = model.fusion, model.num_rows, len(model.branches)
    uniform = isinstance(model.choice, str) and model.choice == "uniform"
    require(routing.num_rows == rows, "num_rows", routing.num_rows, rows)
    close("weights", routing.weights.to(right.weights.dtype), right.weights)
    if right.probs is not None:
        same("probs", routing.probs, right.probs)
    if uniform:
        return
    if right.choice is None:
        require(routing.choice is None, "choice when dense", routing.choice, None)
        counts = (rows,) * count
    else:
        require(torch.equal(routing.choice, right.choice), "choice", routing.choice, right.choice)
        counts = counts_of(right.choice, count)
        require(routing.device_counts.tolist() == list(counts), "device_counts", routing, counts)
    if right.choice is None or fusion.select in (1, "multi_hot") or model.choice is not None:
        require(routing.counts == counts, "counts", routing.counts, counts)
    shares = tuple(count / max(rows, 1) for count in counts)
    if rows and right.choice is not None:
        require(routing.fractions == shares, "fractions", routing.fractions, shares)
    check_costs(model, routing, right, counts, recorded)


def counts_of(choice: Tensor, num_branches: int) -> tuple[int, ...]:
    if choice.dtype is torch.bool:
        return tuple(choice.sum(0).tolist())
    return tuple((choice == branch).sum().item() for branch in range(num_branches))


def check_costs(model: Model, routing: Any, right: Answer, counts: Any, recorded: bool) -> None:
    fusion, rows = model.fusion, model.num_rows
    everyone = (rows,) * len(model.branches)
    if fusion.execution in ("masked", "dense"):
        run = everyone
    else:
        exact = (
            recorded
            and fusion.gate_grad == "straight_through"
            and fusion.select in (1, "multi_hot")
            and right.weights.requires_grad
        )
        whole = fusion.training and not subset_statistics(model)
        run = tuple(
            rows if exact or (whole and reader.batch_norm) else own
            for own, reader in zip(counts, model.branches, strict=True)
        )
    known = any(counts) and not model.integral  # else a shape is found out by running more
    if known and (fusion.execution != "dense" or model.choice is None):
        require(tuple(routing.rows_run) == run, "rows_run", routing.rows_run, run)
    if not model.costs or not rows:
        return
    costs = torch.tensor(model.costs, dtype=torch.float64)
    gate_cost = model.gate_cost if model.choice is None else 0.0
    executed = sum(n * c for n, c in zip(routing.rows_run, model.costs, strict=True)) / rows
    close("executed_cost", torch.tensor(routing.executed_cost), torch.tensor(executed + gate_cost))
    if right.probs is not None:
        expected = (right.probs.detach().double() @ costs).mean() + gate_cost
        close("expected_cost", routing.expected_cost.double(), expected, TOLERANCE[model.dtype])


def check_hooks(model: Model, routing: Any) -> None:
    for name, calls in model.seen.items():
        index = None if name == "gate" else int(name.split()[1])
        reader = model.gate if index is None else model.branches[index]
        rows = (model.num_rows if model.choice is None else 0) if index is None else None
        rows = routing.rows_run[index] if rows is None else rows
        if rows:
            require(bool(calls), f"calls of the hook on {name}", len(calls), "at least one")
        for arguments in calls:
            got, wanted = len(list(flat(arguments))), len(list(flat(reader.reads)))
            require(got == wanted, f"arguments of the hook on {name}", got, wanted)


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
        grads.append(laid_out(values.to(leaf.dtype), layout))
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
            masked, _ = model()
            model.fusion.execution = chosen
            if chosen != "dense":
                for index, (mine, leaf) in enumerate(zip(got, flat(masked), strict=True)):
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
    same_gradients("second derivative", names, mine, wanted, 1e-8, none_is_zero=True)


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
        return [leaf for leaf in flat(model.fusion(*values, choice=model.choice)) if learns(leaf)]

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
