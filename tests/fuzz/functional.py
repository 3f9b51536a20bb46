"""`route`, `gather` and `combine` against loops over samples, values to third derivatives."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynmm_kernels import Shared, combine, gather, route

from .compare import Mismatch, require, same, same_gradients
from .draw import LAYOUTS, Draw, laid_out
from .trees import flat, mapped

DTYPES = {
    torch.float64: 8,
    torch.float32: 1,
    torch.float16: 0.5,
    torch.bfloat16: 0.5,
    torch.complex128: 0.5,
}
MOVED = (
    torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64,
)  # fmt: skip
ROWS = {3: 3, 0: 1, 1: 2, 2: 2, 4: 2, 5: 3, 7: 2, 9: 2, 33: 0.5, 1025: 0.02}
BRANCHES = {3: 4, 1: 1, 2: 3, 4: 2, 7: 1, 300: 0.03}
BRANCH = {
    "tensor": lambda h: h,
    "map": lambda h: h.reshape(-1, 2, 3),
    "transposed": lambda h: h.reshape(-1, 2, 3).transpose(1, 2),
    "vector": lambda h: h[:, 0],
    "expanded": lambda h: h[:, :1].expand(-1, 5),
    "tuple": lambda h: (h[:, :1], h[:, 1:] * 2),
    "nested": lambda h: {"a": [h, None], "b": (h[:, 0], 4)},
    "twice": lambda h: [h, h],
    "no columns": lambda h: (h[:, :0], h),
}


def case(draw: Draw) -> None:
    if draw.pick("selection is", {"right": 9, "faulty": 1}) == "faulty":
        check_faulty(draw)
        return
    num_rows, num_branches = draw.pick("rows", ROWS), draw.pick("branches", BRANCHES)
    selection, table = draw_selection(draw, num_rows, num_branches)
    plan = route(selection, num_branches)
    check_plan(plan, table, num_branches)
    moved = Moved(draw, table, num_branches)
    check_gather(moved, plan)
    check_combine(moved, plan)


def draw_selection(draw: Draw, num_rows: int, num_branches: int) -> tuple[Tensor, list[list[int]]]:
    """A selection for `route`, and for each sample its branches by rank, -1 for none."""
    kind = draw.pick("selection", ("one", "one of rank 2", "ranks", "mask"))
    mix = draw.pick("mix", {"mixed": 4, "all to one": 1, "two of many": 1, "nobody": 0.3})
    if kind == "mask":
        mask = draw.normal(num_rows, num_branches) > {"nobody": 99, "all to one": -99}.get(mix, 0.3)
        mask = laid_out(mask, draw.pick("layout of the selection", LAYOUTS))
        if num_branches == 1 and draw.pick("flat mask", (False, True)):
            return mask[:, 0], [[0 if taken else -1] for taken in mask[:, 0].tolist()]
        return mask, [[b if taken else -1 for b, taken in enumerate(row)] for row in mask.tolist()]
    ranks = draw.pick("ranks", (1, 2, 3)) if kind == "ranks" else 1
    low = -1 if draw.pick("samples without a branch", (False, True)) else 0
    high = {"two of many": min(2, num_branches), "nobody": 0}.get(mix, num_branches)
    values = draw.integers(min(low, high - 1), high, num_rows, ranks)
    if mix == "all to one":
        values.fill_(draw.seed % num_branches)
    table = values.tolist()
    dtype = draw.pick("dtype of the selection", (torch.int64, torch.int32, torch.int16))
    values = values.to(dtype)
    if kind == "one":
        return values[:, 0], table
    return laid_out(values, draw.pick("layout of the selection", LAYOUTS[:5])), table


def check_faulty(draw: Draw) -> None:
    num_rows, num_branches = draw.pick("rows", (3, 1, 9)), draw.pick("branches", (3, 1, 7))
    selection = draw.integers(0, num_branches, num_rows)
    kind = draw.pick("fault", ("too large", "too small", "floating", "mask of another width"))
    row = draw.seed % num_rows
    if kind == "too large":
        selection[row] = num_branches + draw.seed % 1000
    elif kind == "too small":
        selection[row] = -2 - draw.seed % 1000
    elif kind == "floating":
        selection = selection.double()
    else:
        selection = torch.zeros(num_rows, num_branches + 1, dtype=torch.bool)
    with contextlib.suppress(TypeError if kind == "floating" else ValueError):
        plan = route(selection, num_branches)
        raise Mismatch(f"route took a selection that is {kind}: {plan.counts}")


def check_plan(plan: Any, table: list[list[int]], num_branches: int) -> None:
    ranks = len(table[0]) if table else plan.ranks
    entries = [[] for _ in range(num_branches)]
    for n, row in enumerate(table):
        for j, branch in enumerate(row):
            if branch >= 0:
                entries[branch].append(n * ranks + j)
    order = [entry for column in entries for entry in column]
    slots = {entry: slot for slot, entry in enumerate(order)}
    size = len(table) * ranks
    require(plan.num_rows == len(table), "num_rows", plan.num_rows, len(table))
    require(plan.counts == tuple(map(len, entries)), "counts", plan.counts, list(map(len, entries)))
    padded = order + [-1] * (size - len(order))
    require(plan.order.tolist() == padded, "order", plan.order.tolist(), padded)
    inverse = [slots.get(entry, -1) for entry in range(size)]
    require(plan.inverse.flatten().tolist() == inverse, "inverse", plan.inverse.tolist(), inverse)
    starts = [sum(map(len, entries[:b])) for b in range(num_branches + 1)]
    require(plan.offsets.tolist() == starts, "offsets", plan.offsets.tolist(), starts)
    require(list(plan.starts) == starts, "starts", plan.starts, starts)
    for branch in range(min(num_branches, 3)):
        rows = [entry // ranks for entry in entries[branch]]
        require(plan.rows(branch).tolist() == rows, "rows", plan.rows(branch).tolist(), rows)


@dataclass
class Moved:
    """What one case moves."""

    draw: Draw
    table: list[list[int]]
    num_branches: int

    def rows_of(self, branch: int) -> list[int]:
        return [n for n, row in enumerate(self.table) for b in row if b == branch]


def check_gather(moved: Moved, plan: Any) -> None:
    """Every dtype and layout, bit for bit; what has no rows passes through."""
    draw, rows = moved.draw, len(moved.table)
    dtype = draw.pick("dtype moved", MOVED)
    width = draw.pick("width", (3, 1, 0, 2, 5, 17, 64))
    values = draw.integers(0, 256, rows, width).to(dtype)
    source = laid_out(values, draw.pick("layout moved", LAYOUTS))
    table, scalar = draw.normal(2), draw.normal(1)[0]
    packs = {"a": [source, None, 3], "b": (Shared(table), scalar, source), "c": values}
    for branch, got in enumerate(gather(plan, packs)):
        wanted = values_at(source, moved.rows_of(branch))
        same(f"rows of branch {branch}", got["a"][0], wanted, 0.0)
        same(f"rows of branch {branch}, again", got["b"][2], wanted, 0.0)
        same(f"rows of branch {branch}, c", got["c"], values_at(values, moved.rows_of(branch)), 0.0)
        require(got["a"][1:] == [None, 3], "what is no tensor", got["a"][1:], [None, 3])
        shared = got["b"][0]
        shared = shared.tensor if isinstance(shared, Shared) else shared
        require(shared is table and got["b"][1] is scalar, "shared tensors", got["b"], "themselves")

    check_selected(moved, plan, {"a": source, "b": (values, table), "c": values})


def check_selected(moved: Moved, plan: Any, parts: dict[str, Any]) -> None:
    """Each branch's own parts, by key or by position; the rest is not looked at."""
    draw, keys = moved.draw, list(parts)
    by_key = draw.pick("selected by", ("key", "position")) == "key"
    names = keys if by_key else [*range(len(keys))]
    kinds = [
        draw.pick(f"selection of branch {b % 4}", ("one", "some", "one, bare", "all", "nothing"))
        for b in range(moved.num_branches)
    ]
    chosen = {"one": names[:1], "some": names[::-2], "all": names, "nothing": []}
    select = [names[-1] if kind == "one, bare" else chosen[kind] for kind in kinds]
    pack = parts if by_key else [*parts.values()]
    if not any(names[1] in own for own in select if isinstance(own, list)):
        pack = {**pack, names[1]: torch.ones(9999)} if by_key else [pack[0], "text", pack[2]]
    else:
        parts["b"] = pack[names[1]] = (parts["b"][0], Shared(parts["b"][1]))
    for branch, got in enumerate(gather(plan, pack, select)):
        rows, own = moved.rows_of(branch), select[branch]
        if not isinstance(own, list):
            same(f"part of branch {branch}", got, values_at(parts["c"], rows), 0.0)
            continue
        require(len(got) == len(own), f"parts of branch {branch}", len(got), len(own))
        for place, name in enumerate(own):
            part = got[name] if by_key else got[place]
            wanted = parts[keys[names.index(name)]]
            if isinstance(wanted, tuple):
                require(part[1] is wanted[1].tensor, "a shared part", part[1], wanted[1])
                part, wanted = part[0], wanted[0]
            same(f"part {name} of branch {branch}", part, values_at(wanted, rows), 0.0)


def values_at(source: Tensor, rows: list[int]) -> Tensor:
    return source[torch.tensor(rows, dtype=torch.int64)]


def by_hand(moved: Moved, outputs: list[Any], weights: Tensor | None) -> list[Any] | None:
    """Leaves of combine, one sample after the other."""
    leaves = [None if output is None else list(flat(output)) for output in outputs]
    like = next((part for part in leaves if part is not None), None)
    if like is None:
        return None
    used = [0] * moved.num_branches
    samples = []
    for n, row in enumerate(moved.table):
        total: list[Any] = [
            leaf.new_zeros(leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf for leaf in like
        ]
        for j, branch in enumerate(row):
            if branch < 0:
                continue
            at, used[branch] = used[branch], used[branch] + 1
            for place, leaf in enumerate(leaves[branch]):
                if isinstance(leaf, Tensor):
                    term = leaf[at] if weights is None else leaf[at] * weights[n, j]
                    total[place] = total[place] + term.to(total[place].dtype)
        samples.append(total)
    if not samples:
        return [leaf[:0] if isinstance(leaf, Tensor) else leaf for leaf in like]
    return [
        torch.stack(column) if isinstance(column[0], Tensor) else column[0]
        for column in zip(*samples, strict=True)
    ]


def check_combine(moved: Moved, plan: Any) -> None:
    draw, rows, ranks = moved.draw, len(moved.table), plan.ranks
    dtype = draw.pick("dtype", DTYPES)
    x = draw.normal(rows, 4).to(dtype)
    x = laid_out(x, draw.pick("layout of x", LAYOUTS)).detach().requires_grad_()
    matrices = [draw.normal(4, 6).to(dtype).requires_grad_() for _ in range(moved.num_branches)]
    weights = None
    if draw.pick("weights", (False, True)):
        weights = draw.normal(rows, ranks).to(dtype.to_real())
        weights = laid_out(weights, draw.pick("layout of the weights", LAYOUTS)).detach()
        weights.requires_grad_(draw.pick("weights learn", (True, False)))
    structure = BRANCH[draw.pick("structure", tuple(BRANCH))]
    leave_out = draw.pick("outputs of the starved", ("none", "empty")) == "none"
    gathers = draw.pick("rows gathered by", ("gather", "index"))

    def run(own_rows: list[Tensor]) -> list[Any]:
        return [
            None if leave_out and not len(part) else structure((part @ matrix).tanh())
            for part, matrix in zip(own_rows, matrices, strict=True)
        ]

    by_index = [values_at(x, moved.rows_of(b)) for b in range(moved.num_branches)]
    right = by_hand(moved, run(by_index), weights)
    if right is None:
        check_nobody(moved, plan, structure(x.detach() @ matrices[0].detach()))
        return
    flattened = weights is not None and ranks == 1 and draw.pick("weights [N]", (False, True))
    output = combine(
        plan,
        run(gather(plan, x) if gathers == "gather" else by_index),
        weights[:, 0] if flattened else weights,
    )
    got = list(flat(output))
    require(len(got) == len(right), "leaves", len(got), len(right))
    for index, (mine, leaf) in enumerate(zip(got, right, strict=True)):
        if isinstance(leaf, Tensor):
            same(f"output {index}", mine, leaf)
        else:
            require(mine == leaf, f"output {index}", mine, leaf)
    order = draw.pick("order of derivatives", {1: 4, 0: 2, 2: 2, 3: 1})
    if order and dtype in (torch.float64, torch.float32):
        learners, names = [x, *matrices], ["x", *(f"matrix {b}" for b in range(len(matrices)))]
        if weights is not None and weights.requires_grad:
            learners, names = [*learners, weights], [*names, "weights"]
        check_derivatives(order if dtype is torch.float64 else 1, names, learners, got, right)


def check_nobody(moved: Moved, plan: Any, like: Any) -> None:
    """Where every output is None: zeros that look like what they would be."""
    on = moved.draw.pick("device of like", ("cpu", "meta"))
    like = mapped(lambda leaf: leaf.to(on) if isinstance(leaf, Tensor) else leaf, like)
    output = combine(plan, [None] * moved.num_branches, like=like)
    for index, (mine, leaf) in enumerate(zip(flat(output), flat(like), strict=True)):
        if isinstance(leaf, Tensor):
            zeros = torch.zeros(plan.num_rows, *leaf.shape[1:], dtype=leaf.dtype)
            same(f"output {index}", mine, zeros, 0.0)
        else:
            require(mine == leaf, f"output {index}", mine, leaf)


def check_derivatives(
    order: int, names: list[str], learners: list[Tensor], got: list[Any], right: list[Any]
) -> None:
    mine, wanted = curved(got), curved(right)
    for number in range(1, order + 1):
        if not wanted.requires_grad:
            return
        more = number < order
        grads = [
            torch.autograd.grad(
                loss, learners, create_graph=more, allow_unused=True, retain_graph=True
            )
            if loss.requires_grad
            else [None] * len(learners)
            for loss in (mine, wanted)
        ]
        tolerance = 1e-8 if order > 1 else None
        same_gradients(f"derivative {number}", names, *grads, tolerance, none_is_zero=True)
        mine, wanted = (
            sum((g.square().sum() for g in part if g is not None), torch.zeros(()).double())
            for part in grads
        )


def curved(leaves: list[Any]) -> Tensor:
    return sum(
        ((leaf.sin() + leaf.square() * 0.3).sum() for leaf in leaves if isinstance(leaf, Tensor)),
        torch.zeros((), dtype=torch.float64),
    )
