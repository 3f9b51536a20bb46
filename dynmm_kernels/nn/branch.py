"""Branch: a network, the modalities it reads, its name and its cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import ranges
from .arguments import Arguments
from .calling import Callee, Keywords, as_module, joined, parted
from .memory import versions
from .notes import note_origin

Selector = str | int | Sequence[str | int] | Mapping[str, str | int] | Callable[..., Any] | None


class Branch(nn.Module):
    """A network that runs on the samples routed to it, unmodified.

    Args:
        module: any `nn.Module`, a method of one, or a function. Of a method the whole module is
            part of the branch; of what a function uses nothing is, so that its parameters get no
            zero gradients where nobody chose it, and its layers are not looked at.
        inputs: the modalities it reads, so that only those are gathered.
            None: the arguments of the fusion, as they are, keywords too.
            Keys: entries of the one dict argument, or of the keyword arguments where there are
            some; passed as positional arguments in this order.
            Positions: of the arguments, or of the one list or tuple where that is the only one.
            A dict: the names of its parameters and for each a key or position; passed by keyword.
            A callable: called with the arguments; a tuple it returns is splatted, anything else
            is one argument.
        name: used in messages and tables; default: its position or key in the fusion.
        cost: per sample, in any unit (multiply-accumulates, ms), for `Routing` and `resource_loss`.
    """

    title: str | None = None  # what messages call it; None: branch, and its name
    # Given the branch and what `call` is: (output,), or None where the module must be called.
    replay: Callable[..., tuple[Any] | None] | None = None

    def __init__(
        self,
        module: Callee,
        inputs: Selector = None,
        name: str | None = None,
        cost: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(inputs, bool):
            raise TypeError(f"Branch: inputs must be keys, positions or a callable; got {inputs}")
        if isinstance(inputs, (str, int)):
            inputs = [inputs]
        self.module = as_module(module, "Branch: module")
        self.inputs = inputs
        self.name = name
        self.cost = cost
        self._look_at_module()

    def forward(self, *inputs: Any, selected: bool = False, **named: Any) -> Any:
        """The module's output. `selected`: `inputs` are what it reads, not what the fusion got."""
        if not selected:
            inputs, named = parted(self.select(joined(inputs, named)))  # type: ignore[assignment]
        return self.module(*inputs, **named)

    def train(self, mode: bool = True) -> Branch:
        super().train(mode)
        self._look_at_module()
        return self

    def _look_at_module(self) -> None:
        parts = [*self.module.modules()]
        self.norms = [part for part in parts if isinstance(part, _BatchNorm)]
        # It may write into its inputs: ReLU(inplace=True) and its kind.
        self.in_place = any(getattr(part, "inplace", False) is True for part in parts)
        self.tables = [part._buffers for part in parts if part._buffers]
        self.overridden = type(self).forward is not Branch.forward

    def extra_repr(self) -> str:
        known = {"name": self.name, "inputs": self.inputs, "cost": self.cost}
        return ", ".join(f"{key}={value}" for key, value in known.items() if value is not None)

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.title or f"branch {self.name!r}"

    @property
    def range(self) -> str:
        """What profiles call it."""
        return f"branch[{self.name}]"

    def couples_samples(self) -> bool:
        """Whether a sample's output depends on the others: BatchNorm using batch statistics."""
        if self.training and not is_dynamo_compiling():
            self._look_at_module()  # layers may have been added
        for norm in self.norms:
            if norm.training or norm.running_mean is None:
                return True
        return False

    def select(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the module, out of those of the fusion.

        Raises:
            ValueError: a modality that the arguments do not have.
        """
        wanted = self.inputs
        if wanted is None:
            return inputs
        if callable(wanted):
            given, named = parted(inputs)
            selected = wanted(*given, **named)
            return selected if type(selected) is tuple else (selected,)
        if isinstance(wanted, Mapping):
            parts = [self._find(key, inputs) for key in wanted.values()]
            return joined((), dict(zip(wanted, parts, strict=True)))
        return tuple([self._find(key, inputs) for key in wanted])

    def _find(self, key: str | int, inputs: tuple[Any, ...]) -> Any:
        """One modality."""
        given, named = parted(inputs)
        pack = given[0] if len(given) == 1 else given
        if named and not (isinstance(key, int) and given):
            pack = named
        if isinstance(pack, Mapping):
            if key not in pack:
                raise ValueError(
                    f"{self.label} reads modality {key!r}; the inputs have "
                    f"{', '.join(map(repr, pack))}"
                )
            return pack[key]
        if isinstance(pack, Tensor) or not isinstance(pack, (list, tuple)):
            pack = given
        if not isinstance(key, int):
            raise ValueError(
                f"{self.label} reads modality {key!r} by name, so the fusion must be called with "
                f"one dict or with keywords; got {', '.join(type(x).__name__ for x in given)}"
            )
        if not -len(pack) <= key < len(pack):
            raise ValueError(f"{self.label} reads modality {key}; there are {len(pack)} inputs")
        return pack[key]

    def arguments(self, batch: Arguments) -> Arguments:
        """What this branch reads of the fusion's arguments; selected once, with a graph or not."""
        if self.inputs is None:
            return batch
        key = self, torch.is_grad_enabled()  # what is selected without a graph is of no use to one
        own = batch.parts.get(key)
        if own is None:
            own = Arguments(self.select(batch.selected), self.label, batch.num_rows)
            batch.parts[key] = own
        return own

    def call(self, arguments: Sequence[Any], rows: Sequence[int] | None = None) -> Any:
        """The module's output for what `select` selected.

        `rows`: positions of its per-sample leaves, where they are known; a replay needs them.
        Hooks of the branch, its compiled form and a `forward` of a subclass are in use.
        The module's own exceptions are raised as they are, with a note that names the branch.
        """
        if is_dynamo_compiling() or not profiler._is_profiler_enabled:
            return self.call_unnamed(arguments, rows)
        with ranges.own_or_rest(self.range):
            return self.call_unnamed(arguments, rows)

    def call_unnamed(self, arguments: Sequence[Any], rows: Sequence[int] | None = None) -> Any:
        """`call` without a range in profiles."""
        state = self.__dict__  # past Module.__getattr__, which is slow
        try:
            replay = state.get("replay")
            if replay is not None:
                played = replay(self, arguments, rows)
                if played is not None:
                    return played[0]
            if (
                state["_forward_pre_hooks"]
                or state["_forward_hooks"]
                or state["_backward_pre_hooks"]
                or state["_backward_hooks"]
                or state["overridden"]
                or state.get("_compiled_call_impl") is not None
            ):
                given, named = parted(tuple(arguments))
                if self.inputs is not None:
                    named = {**named, "selected": True}
                return self(*given, **named)
            if arguments and type(arguments[-1]) is Keywords:
                return state["_modules"]["module"](*arguments[:-1], **arguments[-1])
            return state["_modules"]["module"](*arguments)
        except Exception as error:
            note_origin(error, self.label)
            raise

    def buffers_held(self) -> list[Tensor]:
        """The module's buffers, which it may return."""
        if not self.tables:
            return []
        tensors = (tensor for table in self.tables for tensor in table.values())
        return [tensor for tensor in tensors if tensor is not None]

    def call_reading(
        self,
        tensors: Iterable[Tensor],
        arguments: Sequence[Any],
        rows: Sequence[int] | None = None,
    ) -> Any:
        """`call` where others read `tensors`, too: the caller, the gate, other branches.

        Raises:
            ValueError: the module wrote into them.
        """
        if is_dynamo_compiling():  # a compiler knows who writes where
            return self.call(arguments, rows)
        before = versions(tensors)
        call = self.call if profiler._is_profiler_enabled else self.call_unnamed
        output = call(arguments, rows)
        if versions(tensors) != before:
            raise ValueError(
                f"{self.label} must not write into its inputs, which others read as well; let its "
                "first operation work out of place"
            )
        return output

    def call_whole(self, batch: Arguments, num_rows: int | None) -> Any:
        """`call_reading` for all samples; a copy of them where it may write."""
        own = self.arguments(batch)
        arguments = own.whole(num_rows, copied=self.in_place)
        return self.call_reading(own.tensors(), arguments, own.rows_at_hand())

    def read_from(self, batch: Arguments) -> list[Tensor]:
        """What its outputs depend on and requires grad: parameters, and tensors that it reads."""
        tensors = [*self.parameters(), *self.arguments(batch).held()]
        return [tensor for tensor in tensors if tensor.requires_grad]


class Branches(nn.ModuleList):
    """Branches or stages; a module put in the place of one takes over its name and inputs."""

    def __setitem__(self, index: int, module: nn.Module) -> None:
        super().__setitem__(index, in_place_of(self[index], module))

    def all(self) -> list[Any]:
        """As a list, sooner than by iteration."""
        return [*self._modules.values()]


def part(module: nn.Module, name: str) -> Any:
    """The submodule of that name, past Module.__getattr__, which is slow."""
    return module._modules[name]


def in_place_of(old: nn.Module | None, module: nn.Module) -> nn.Module:
    """`module` as a branch like `old`, named as it is; what it costs is not known."""
    if not isinstance(old, Branch):
        return module
    new = module if isinstance(module, Branch) else Branch(module, old.inputs)
    if isinstance(new, type(old)) and new.name is not None:
        return new
    named = type(old)(new.module, new.inputs, new.name or old.name, new.cost)
    named.title = old.title if new.name is None else None
    return named


def as_branch(module: Callee, name: str, title: str | None = None) -> Branch:
    """A named branch; a Branch without a name is not marked by the fusion that uses it."""
    module = as_module(module, title or f"branch {name!r}")
    if isinstance(module, Branch) and module.name is not None:
        return module
    # A copy has the same module and hooks, under a name of its own.
    named = copy.copy(module) if isinstance(module, Branch) else Branch(module)
    named.name, named.title = name, title
    return named


@contextmanager
def forward_only(branches: Iterable[Branch]) -> Iterator[None]:
    """torch.no_grad for branches that run again with a graph, and record their statistics then.

    BatchNorm goes on using batch statistics. In torch 2.10 autocast hands the weights it cast here,
    without a graph, to the later run, whose parameters then get no gradient; so it must not keep
    them.
    """
    norms = [norm for branch in branches for norm in branch.norms if norm.training]
    recording = [norm for norm in norms if norm.track_running_stats]
    traced = is_dynamo_compiling()
    keeps = traced or torch.is_autocast_cache_enabled()
    try:
        for norm in recording:
            norm.track_running_stats = False
        if not traced:
            torch.set_autocast_cache_enabled(False)
        with torch.no_grad(), ranges.following():
            yield
    finally:
        for norm in recording:
            norm.track_running_stats = True
        if not traced:
            torch.set_autocast_cache_enabled(keeps)
