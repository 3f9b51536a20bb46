"""A random `RoutedFusion`, and what the oracle needs to know of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynmm_kernels import Branch, RoutedFusion

from .draw import Draw
from .networks import (
    FAULTS,
    FEATURES,
    FLAT,
    LOSSES,
    NO_HALF,
    OF_WIDTHS,
    STRUCTURES,
    Gate,
    Network,
    Writes,
    begins_in_place,
    reads_one_tensor,
)
from .trees import Leaf, Leaves, draw_inputs, draw_selector, flat, mapped

CONTEXTS = {
    "gradients": 10,
    "no_grad": 4,
    "inference": 1,
    "inference tensors": 1,
    "checkpoint": 1,
    "autocast": 1,
    "second order": 2,
    "hvp": 0.5,
    "forward mode": 0.5,
}
DTYPES = {torch.float64: 12, torch.float32: 1, torch.float16: 0.5, torch.bfloat16: 0.5}
ROWS = {3: 3, 0: 1, 1: 2, 2: 2, 4: 3, 5: 3, 6: 2, 7: 2, 8: 1, 9: 1, 33: 0.2, 1025: 0.005}
INTEGRAL = ("with integers", "with bools", "integers", "bools")
STYLES = {"network": 6, "in place": 1, "identity": 0.5, "batch norm": 0.7, "writes": 0.3}


@dataclass
class Reader:
    """A gate or branch as the oracle sees it: a module, and the leaves it reads."""

    module: nn.Module
    reads: tuple[Any, ...]
    in_place: bool = False
    writes: bool = False
    batch_norm: bool = False
    after: Callable[[Any], Any] = lambda output: output

    def __call__(self, samples: Any) -> Any:
        rows = mapped(lambda leaf: leaf.rows(samples), self.reads)
        if self.in_place:
            rows = mapped(Tensor.clone, rows)
        return self.after(self.module(*rows))

    def norms(self) -> list[nn.BatchNorm1d]:
        return [part for part in self.module.modules() if isinstance(part, nn.BatchNorm1d)]


class Named(nn.Module):
    """A network that is called by keyword: with its arguments, or with the parts of the one."""

    def __init__(self, module: nn.Module, selected: bool) -> None:
        super().__init__()
        self.module, self.selected = module, selected

    def forward(self, **named: Any) -> Any:
        return self.module(*named.values()) if self.selected else self.module(named)


def as_called(
    draw: Draw, name: str, module: nn.Module, selector: Any, by_keyword: bool
) -> tuple[Any, Any]:
    """What the library is given to call, and the selector for it."""
    if isinstance(selector, dict) or (by_keyword and selector is None):
        module = Named(module, selector is not None)
    if callable(selector) and by_keyword:
        select = selector
        selector = lambda *given, **named: select(*given, *([named] if named else []))  # noqa: E731
    if draw.pick(f"{name} as", {"module": 6, "method": 1}) == "method":
        return module.__call__, selector
    return module, selector


@dataclass
class Model:
    """One case: inputs, modules, settings and the call."""

    draw: Draw
    context: str
    num_rows: int
    dtype: torch.dtype
    arguments: tuple[Any, ...]
    structures: list[str]
    gate: Reader
    branches: list[Reader]
    fusion: RoutedFusion
    choice: Any
    costs: list[float] | None
    gate_cost: float
    by_keyword: bool = False
    seen: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Leaf]:
        return list(dict.fromkeys(flat(self.arguments)))

    def values(self) -> tuple[Any, ...]:
        return mapped(lambda leaf: leaf.value, self.arguments)

    def __call__(self, *values: Any) -> tuple[Any, Any]:
        options = {"choice": self.choice, "return_routing": True}
        if self.draw.pick("generator", (False, True)):
            options["generator"] = torch.Generator().manual_seed(self.draw.seed)
        values = values or self.values()
        if self.by_keyword:
            return self.fusion(**values[0], **options)
        return self.fusion(*values, **options)

    def learners(self) -> tuple[list[str], list[Tensor]]:
        """Names and tensors of all that may get a gradient."""
        named = [
            (f"{leaf.role} input {index}", leaf.tensor)
            for index, leaf in enumerate(self.leaves)
            if leaf.tensor is not None and leaf.tensor.requires_grad
        ]
        named += [item for item in self.fusion.named_parameters() if item[1].requires_grad]
        return [name for name, _ in named], [tensor for _, tensor in named]

    @property
    def fault(self) -> str:
        parts = self.branches[-1].module.modules()
        return next((part.fault for part in parts if isinstance(part, Network)), "none")

    @property
    def integral(self) -> bool:
        return any(name in INTEGRAL for name in self.structures)

    @property
    def noisy(self) -> bool:
        always = self.fusion.noise == "gumbel_always"
        return self.choice is None and (
            always or (bool(self.fusion.noise) and self.fusion.training)
        )


def gate_bias(draw: Draw, num_branches: int, select: Any) -> Tensor:
    """Logits' bias: mixed, all to one branch, one starved, or (multi-hot) none at all."""
    bias = draw.normal(num_branches)
    shape = draw.pick("mix", {"mixed": 4, "all to one": 1, "one starved": 1, "none": 0.5})
    if shape == "all to one":
        bias[draw.seed % num_branches] += 20
    elif shape == "one starved":
        bias[draw.seed % num_branches] -= 20
    elif shape == "none" and select == "multi_hot":
        bias -= 20
    return bias


def draw_branch(
    draw: Draw, index: int, arguments: tuple[Any, ...], dtype: torch.dtype, structure: str
) -> tuple[Reader, Any]:
    """A branch for the oracle, and its selector for the library."""
    selector, reads = draw_selector(draw, f"branch {index}", arguments)
    style = draw.pick(f"branch {index}", STYLES)
    one = reads_one_tensor(reads)
    fits = one and structure == "tensor" and reads[0].tensor.shape[1:] == (FEATURES,)
    if style == "identity" and fits:
        return Reader(nn.Identity(), reads), selector
    normed = style == "batch norm" and structure not in LOSSES
    network: nn.Module = Network(draw, reads, dtype, structure, batch_norm=normed)
    in_place = style == "in place" and one
    if in_place:
        network = begins_in_place(draw, f"branch {index}", network)
    writes = style == "writes" and one
    if writes:
        network = Writes(network)
    return Reader(network, reads, in_place or writes, writes, normed), selector


def draw_structures(draw: Draw, outputs: str, structure: str, num_branches: int) -> list[str]:
    """What each branch returns: the same, but for widths or by name."""
    if outputs == "concat" and structure in FLAT:
        structure = "tensor"
    if outputs == "dict":
        free: tuple[str, ...] = ("dict", "tensor", "vector", "with none", structure)
    else:
        free = OF_WIDTHS if outputs == "concat" and structure in OF_WIDTHS else (structure,)
    return [draw.pick(f"structure of branch {i}", free) for i in range(num_branches)]


def draw_fill(draw: Draw, structures: list[str]) -> float:
    whole = any(name in INTEGRAL for name in structures)
    return draw.pick("fill", (0, 1) if whole else (0.0, 1.0, -2.5))


def draw_choice(draw: Draw, num_rows: int, num_branches: int) -> Any:
    kinds = {"gate": 12, "int": 1, "tensor": 2, "with -1": 1, "mask": 0.7}
    kind = draw.pick("choice", kinds | {"random": 0.5, "uniform": 0.7})
    if kind == "mask":
        return draw.integers(0, 2, num_rows, num_branches) > 0
    if kind == "int":
        return draw.seed % num_branches
    if kind in ("tensor", "with -1"):
        return draw.integers(0 if kind == "tensor" else -1, num_branches, num_rows)
    return None if kind == "gate" else kind


def draw_model(draw: Draw) -> Model:
    context = draw.pick("context", CONTEXTS)
    dtype = draw.pick("dtype", DTYPES)
    if context != "gradients" and context != "no_grad":
        dtype = torch.float32 if context == "autocast" else torch.float64
    num_rows = draw.pick("rows", ROWS)
    num_branches = draw.pick("branches", {2: 4, 1: 1, 3: 3, 4: 1, 5: 1})
    structure = draw.pick("structure", tuple(STRUCTURES))
    if structure in NO_HALF and (dtype.itemsize == 2 or context == "autocast"):
        structure = "tensor"
    arguments = draw_inputs(Leaves(draw, num_rows, dtype))
    select = draw.pick("select", {1: 6, "multi_hot": 2, "k": 2})
    if select == "k":
        select = 1 + draw.seed % num_branches
    selector, reads = draw_selector(draw, "gate", arguments)
    gate = Reader(Gate(draw, reads, dtype, gate_bias(draw, num_branches, select)), reads)
    outputs = draw.pick("outputs", {"sum": 6, "stack": 1, "concat": 1, "dict": 1})
    structures = draw_structures(draw, outputs, structure, num_branches)
    drawn = [draw_branch(draw, i, arguments, dtype, name) for i, name in enumerate(structures)]
    branches = [reader for reader, _ in drawn]
    freeze(draw, gate, branches)
    spoilt = "" if outputs in ("concat", "dict") else structures[-1]
    spoil(draw, context, branches[-1], spoilt, num_rows)

    costs = [draw.pick(f"cost {i}", (1.0, 2.5, 7.0)) for i in range(num_branches)]
    costs = costs if draw.pick("costs", (False, True)) else None
    gate_cost = 0.5 if costs else 0.0
    by_keyword = isinstance(arguments[0], dict) and draw.pick("inputs by", ("keyword", "position"))
    by_keyword = by_keyword == "keyword"
    called = [
        as_called(draw, f"branch {i}", reader.module, selector, by_keyword)
        for i, (reader, selector) in enumerate(drawn)
    ]
    wrapped = [
        Branch(module, inputs=selector, cost=costs[i] if costs else None)
        if selector is not None or costs
        else module
        for i, (module, selector) in enumerate(called)
    ]
    asked, selector = as_called(draw, "gate", gate.module, selector, by_keyword)
    by_name = draw.pick("branches by name", (False, True))
    grads = ("straight_through", "selected", "none")
    batch_norm = draw.pick("batch norm", ("masked", "subset"))
    training = draw.pick("training", (True, False))
    subset = batch_norm == "subset" and training and any(part.batch_norm for part in branches)
    fusion = RoutedFusion(
        Branch(asked, inputs=selector, cost=gate_cost or None),
        {f"b{i}": part for i, part in enumerate(wrapped)} if by_name else wrapped,
        execution=draw.pick("execution", {"routed": 4, "auto": 2, "masked": 1, "dense": 1}),
        gate_grad=draw.pick("gate_grad", grads[1:] if subset else grads),
        temperature=draw.pick("temperature", (1.0, 0.5, 2.0)),
        noise=draw.pick("noise", {None: 8, "gumbel": 1, "gumbel_always": 0.5})
        if dtype is torch.float64
        else None,
        select=select,
        batch_norm=batch_norm,
        outputs=outputs,
        fill=draw_fill(draw, structures) if outputs != "sum" else 0.0,
    ).train(training)
    choice = draw_choice(draw, num_rows, num_branches)
    if choice is not None and draw.pick("gate", ("given", "none")) == "none":
        fusion.gate = None
    model = Model(
        draw, context, num_rows, dtype, arguments, structures,
        gate, branches, fusion, choice, costs, gate_cost, by_keyword,
    )  # fmt: skip
    add_hooks(model)
    return model


def spoil(draw: Draw, context: str, branch: Reader, structure: str, num_rows: int) -> None:
    """A branch that returns what it must not; under autocast, one that ends in float."""
    fault = draw.pick("fault", dict.fromkeys(FAULTS, 0.3) | {"none": 40})
    in_float = context == "autocast" and draw.pick("last branch in float", (False, True))
    for part in branch.module.modules():
        if isinstance(part, Network):
            part.in_float = in_float
            if structure == "tensor" and num_rows and context in ("gradients", "no_grad"):
                part.fault = fault


def freeze(draw: Draw, gate: Reader, branches: list[Reader]) -> None:
    frozen = draw.pick("frozen", {"nothing": 6, "gate": 1, "first branch": 1, "branches": 0.5})
    parts = {"nothing": [], "gate": [gate], "first branch": branches[:1], "branches": branches}
    for part in parts[frozen]:
        part.module.requires_grad_(False)


def doubled(output: Any) -> Any:
    def double(leaf: Any) -> Any:
        learns = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        return leaf * 2 if learns else leaf

    return mapped(double, output)


def add_hooks(model: Model) -> None:
    """Hooks that note their arguments; one kind also changes what the branch returns."""
    kind = model.draw.pick(
        "hooks", {"none": 6, "branches": 1, "gate": 1, "inner": 1, "that change": 1}
    )
    if model.context == "checkpoint":
        return

    def noting(name: str):
        model.seen[name] = []

        def note(module: nn.Module, given: tuple[Any, ...], named: Any = None) -> None:
            named = {k: v for k, v in (named or {}).items() if k != "selected"}
            model.seen[name].append((given, named))

        return note

    for index, (branch, reader) in enumerate(
        zip(model.fusion.branches, model.branches, strict=True)
    ):
        if kind == "branches":
            branch.register_forward_pre_hook(noting(f"branch {index}"), with_kwargs=True)
        elif kind == "inner":
            reader.module.register_forward_pre_hook(noting(f"branch {index}"), with_kwargs=True)
        elif kind == "that change":
            branch.register_forward_hook(lambda module, arguments, output: doubled(output))
            reader.after = doubled
    if kind == "gate" and model.fusion.gate is not None:
        model.fusion.gate.register_forward_pre_hook(noting("gate"), with_kwargs=True)
