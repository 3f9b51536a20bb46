"""Values, `Routing` and hooks of a `RoutedFusion` against what the oracle says."""

from typing import Any

import torch
from torch import Tensor

from dynmm_kernels.functional.filled import LEAST

from .compare import TOLERANCE, close, require, same
from .routed_model import Model
from .routed_oracle import Answer, subset_statistics
from .trees import flat


def learns(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def weighted(model: Model) -> bool:
    """Whether outputs are multiplied by what need not be 0 or 1, or summed."""
    if model.choice is not None:
        several = isinstance(model.choice, Tensor) and model.choice.dtype == torch.bool
        return several or (isinstance(model.choice, str) and model.choice == "uniform")
    return model.fusion.execution == "dense" or model.fusion.select != 1


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
    if fusion.outputs in ("concat", "dict") and fusion.execution in ("routed", "auto"):
        run = tuple(number or LEAST for number in run)  # for their shapes
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
