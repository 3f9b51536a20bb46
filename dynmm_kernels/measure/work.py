"""Calls to be timed: a fusion, or its branches and gate by themselves on rows gathered before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import ranges, tree
from ..nn.arguments import Arguments
from ..nn.branch import Branch, forward_only

Call = Callable[[], None]


class Part(NamedTuple):
    """One call of a branch or gate; `rest`: without a graph, as on samples it was not chosen for.

    Attributes:
        rows: positions of its per-sample leaves.
    """

    branch: Branch
    arguments: tuple[Any, ...]
    rows: list[int] | None
    rest: bool = False

    def __call__(self) -> Any:
        if self.rest:
            with forward_only([self.branch]):
                return self.branch.call(self._own(), self.rows)
        return self.branch.call(self._own(), self.rows)

    def _own(self) -> tuple[Any, ...]:
        """Copies for who may write there; a fusion copies or gathers, too."""
        if not self.branch.in_place:
            return self.arguments
        leaves, spec = tree.flatten(self.arguments)
        return tree.unflatten([x.clone() if isinstance(x, Tensor) else x for x in leaves], spec)


def part(branch: Branch, batch: Arguments, rows: int | Tensor, rest: bool = False) -> Part:
    """`rows`: the first so many, over again where there are fewer; or bool [N], which ones."""
    own = branch.arguments(batch)
    return Part(branch, own.of(take(own, rows)), own.rows_at_hand(), rest)


def take(own: Arguments, rows: int | Tensor) -> list[Tensor]:
    """These rows of the per-sample leaves, apart from any graph."""
    size = own.leaves[own.rows[0]].shape[0]
    index: Any
    if isinstance(rows, Tensor):
        index = rows.nonzero().squeeze(1)
    else:
        index = slice(rows) if rows <= size else torch.arange(rows) % size
    taken: dict[int, Tensor] = {}
    for i in own.rows:
        leaf = own.leaves[i]
        if id(leaf) not in taken:
            place = index.to(leaf.device) if isinstance(index, Tensor) else index
            taken[id(leaf)] = leaf.detach()[place].requires_grad_(leaf.requires_grad)
    return [taken[id(own.leaves[i])] for i in own.rows]


def batch_of(inputs: tuple[Any, ...], rows: int | None = None) -> Arguments:
    """The inputs of a fusion, apart from the graph that made them; `rows` of them.

    Raises:
        ValueError, TypeError: inputs without samples, or that cannot be split or repeated by row.
    """
    given = Arguments(inputs, "the inputs")
    if any(isinstance(leaf, tree.Lazy) for leaf in given.leaves):
        raise TypeError("the inputs hold a Lazy modality; to measure, give its tensor")
    if not given.num_rows:
        raise ValueError("the inputs must hold tensors [N, ...] of at least one sample")
    own = given.of(take(given, given.num_rows if rows is None else rows))
    if any(isinstance(leaf, tree.Shared) for leaf in given.leaves):  # which `of` takes off
        leaves, spec = tree.flatten(own)
        pairs = zip(leaves, given.leaves, strict=True)
        own = tree.unflatten(
            [old if isinstance(old, tree.Shared) else new for new, old in pairs], spec
        )
    return Arguments(own, "the inputs")


def alone(parts: Sequence[Part], training: bool) -> Call:
    """The parts one after the other; in training with one backward pass of all of them."""
    if not training:
        return _without_graph(lambda: [run() for run in parts])
    modules = [p.branch for p in parts if not p.rest]
    inputs = [leaf for p in parts if not p.rest for leaf in tree.flatten(p.arguments)[0]]

    def forward() -> list[Any]:
        outputs = []
        for run in parts:
            if run.rest:
                run()
            else:
                outputs.append(run())
        return outputs

    return _step(forward, modules, inputs)


def whole(fusion: nn.Module, batch: Arguments, training: bool) -> Call:
    """The fusion; in training with its backward pass."""
    if not training:
        return _without_graph(lambda: fusion(*batch.selected))
    return _step(lambda: fusion(*batch.selected), [fusion], batch.leaves)


def gradients(
    forward: Callable[[], Any], modules: Iterable[nn.Module], inputs: Iterable[Any]
) -> Sequence[Tensor | None]:
    """Of the sum of all outputs, by parameters and inputs; nothing is added to any `.grad`."""
    with torch.enable_grad():
        return _backward(forward(), _wanted(modules, inputs))


def _step(forward: Callable[[], Any], modules: Iterable[nn.Module], inputs: Iterable[Any]) -> Call:
    wanted = _wanted(modules, inputs)

    def step() -> None:
        with torch.enable_grad():
            _backward(forward(), wanted)

    return step


def _wanted(modules: Iterable[nn.Module], inputs: Iterable[Any]) -> list[Tensor]:
    """What requires a gradient, each once."""
    tensors: list[Tensor] = [p for module in modules for p in module.parameters()]
    tensors += [leaf for leaf in inputs if isinstance(leaf, Tensor)]
    return [*{id(x): x for x in tensors if x.requires_grad}.values()]


def _backward(outputs: Any, wanted: list[Tensor]) -> Sequence[Tensor | None]:
    leaves = [y for y in tree.flatten(outputs)[0] if isinstance(y, Tensor) and y.requires_grad]
    if not (wanted and leaves):
        return [None] * len(wanted)
    ones = [torch.ones_like(leaf) for leaf in leaves]
    if not ranges.recording():
        return torch.autograd.grad(leaves, wanted, ones, allow_unused=True)
    with ranges.span("backward"):
        return torch.autograd.grad(leaves, wanted, ones, allow_unused=True)


def _without_graph(forward: Callable[[], Any]) -> Call:
    def run() -> None:
        with torch.no_grad():
            forward()

    return run
