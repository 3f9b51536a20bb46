"""What a recorded call would not notice: side effects, hooks, train mode, other parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .branch import Branch
from .memory import versions


class Refused(Exception):
    """Why a branch is not replayed: what it is or does, behind its name."""


_is_training = itemgetter("training")


class Watch:
    """Looks at a branch before each replay; in C loops, for there may be hundreds of tensors."""

    def __init__(self, branch: Branch) -> None:
        parts = [*branch.module.modules()]
        if any(isinstance(part, torch.jit.ScriptModule) for part in parts):
            raise Refused("holds a ScriptModule, whose parameters cannot be watched")
        self._states = [part.__dict__ for part in parts]
        self._hooks = [hooks_of_all._global_forward_hooks, hooks_of_all._global_forward_pre_hooks]
        for part in (branch, *parts):
            self._hooks += [part._forward_hooks, part._forward_pre_hooks]
        self._tables: list[dict[str, Any]] = [part._modules for part in (branch, *parts)]
        for part in parts:
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            self._tables += filter(None, tables)
        self._entries = [*self._now()]
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._tables))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """What recorded calls read: it must stay where it is, so it is kept alive."""
        known = {id(tensor) for tensor in self._tensors}
        self._tensors += [tensor for tensor in tensors if id(tensor) not in known]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]

    def changed(self) -> bool:
        """Whether modules, parameters or buffers were replaced, or moved to other memory."""
        now = [*self._now()]
        if len(now) != len(self._entries) or not all(map(is_, now, self._entries)):
            return True
        return [*map(Tensor.data_ptr, self._tensors)] != self._addresses

    def check(self, branch: Branch) -> None:
        """Raises Refused for a branch that cannot be replayed now."""
        if branch.training or any(map(_is_training, self._states)):
            raise Refused("is in train mode; call eval() on the fusion")
        if any(self._hooks):
            raise Refused("has forward hooks, which a replay would not call; remove them")


def observe(
    branch: Branch, run: Callable[[], Any], inputs: Sequence[Tensor], device: torch.device
) -> tuple[Any, list[Tensor]]:
    """The output of `run`, which calls the branch on `inputs`, and what else it reads.

    Raises:
        Refused: it has side effects, which a replay would leave out or do behind one's back.
    """
    run()  # what is made at the first call is there then
    parts = {name: part for name, part in branch.named_modules() if part is not branch}
    before = {name: _attributes(part) for name, part in parts.items()}
    draws = _random_states(device)
    with _Reads(inputs) as reads, _waits_refused(device):
        output = run()
    if not all(map(torch.equal, draws, _random_states(device))):
        raise Refused("draws random numbers, which a replay would repeat or skip")
    written = reads.written()
    for name, tensor in chain(branch.named_parameters(), branch.named_buffers()):
        if any(tensor is other for other in written):
            raise Refused(f"writes into its {name} whenever it is called")
    if written:
        raise Refused(f"writes into a tensor {list(written[0].shape)} whenever it is called")
    for name, part in parts.items():
        for key, value in _attributes(part).items():
            if key not in before[name] or not _same(before[name][key], value):
                raise Refused(f"sets {name}.{key} whenever it is called")
    return output, [tensor for tensor, _ in reads.others.values()]


def _attributes(part: nn.Module) -> dict[str, Any]:
    attributes = dict(part.__dict__)
    for table in (part._modules, part._parameters, part._buffers):
        attributes.update(table)
    return attributes


def _same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    plain = (bool, int, float, str, torch.Size)
    return isinstance(before, plain) and type(before) is type(after) and before == after


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _waits_refused(device: torch.device) -> Iterator[None]:
    """On a GPU: found here, for a graph that fails while it is recorded leaves traces in torch."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # of all threads: an error would hit others
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
    if any("called a synchronizing CUDA operation" in str(each.message) for each in caught):
        raise Refused("waits for the device, as .item() and nonzero() do")


class _Reads(TorchDispatchMode):
    """The tensors that a call reads and neither got nor made, with their versions before it.

    Memory that was there before the call cannot be given to a tensor made in it, so its address
    tells the two apart.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.others: dict[int, tuple[Tensor, list[int]]] = {}
        self._addresses: set[int] = set()  # of the others
        self._made = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _strided((args, kwargs or {})):
            address = tensor.untyped_storage().data_ptr()
            if address and address not in self._made:
                self._addresses.add(address)
                self.others.setdefault(id(tensor), (tensor, versions([tensor])))
        output = func(*args, **(kwargs or {}))
        made = {tensor.untyped_storage().data_ptr() for tensor in _strided(output)}
        self._made |= made - self._addresses
        return output

    def written(self) -> list[Tensor]:
        return [tensor for tensor, before in self.others.values() if versions([tensor]) != before]


def _strided(values: Any) -> list[Tensor]:
    plain = [leaf for leaf in pytree.tree_leaves(values) if type(leaf) in (Tensor, nn.Parameter)]
    return [tensor for tensor in plain if tensor.layout is torch.strided]
