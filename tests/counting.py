"""What a call costs beside the modules it runs: launches, allocations and waits for the device.

They are seen at the dispatcher, on a GPU and on the CPU. On the CPU every operator that computes
is a launch, and the host waits where it reads what did not come from numbers drawn on the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DRAWS = "aten::randint"
READS = ("aten::_local_scalar_dense", "aten::nonzero")
COPIES = ("aten::_to_copy", "aten::copy_")
EMPTY = ("aten::empty", "aten::new_empty")


class Count(NamedTuple):
    launches: int
    allocations: int
    waits: int


class Counter(TorchDispatchMode):
    """Counts while it is active and not paused.

    `device`: what is launched, allocated and waited for there.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.paused = False
        self.clear()

    def clear(self) -> None:
        self.launched: list[str] = []
        self.allocated: list[str] = []
        self.waited: list[str] = []
        self.on_host: list[Tensor] = []  # where the device is the CPU, too; nothing else tells

    def count(self) -> Count:
        return Count(len(self.launched), len(self.allocated), len(self.waited))

    @contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def __enter__(self):
        self.tolist, self.synchronize = torch.Tensor.tolist, torch.cuda.Event.synchronize

        def tolist(tensor: Tensor) -> Any:
            if self.device == "cpu" and not self.is_on_host(tensor):
                self.wait("tolist")
            return self.tolist(tensor)

        def synchronize(event: torch.cuda.Event) -> None:
            self.wait("synchronize")
            self.synchronize(event)

        torch.Tensor.tolist, torch.cuda.Event.synchronize = tolist, synchronize
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch.Tensor.tolist, torch.cuda.Event.synchronize = self.tolist, self.synchronize
        super().__exit__(*error)

    def wait(self, where: str) -> None:
        if not self.paused:
            self.waited.append(where)

    def is_on_host(self, tensor: Tensor) -> bool:
        memory = _memory(tensor)
        return tensor.device.type != self.device or any(
            _memory(other) == memory for other in self.on_host
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        results = func(*args, **kwargs)
        if not self.paused:
            flags = [kwargs.get("non_blocking", False), *(x for x in args if type(x) is bool)]
            self._note(func, given, _tensors(results), any(flags))
        return results

    def _note(self, func: Any, given: list[Tensor], made: list[Tensor], asynchronous: bool) -> None:
        name = func._schema.name
        draws = name.startswith(DRAWS)
        if draws or (given and all(map(self.is_on_host, given))):
            self.on_host += made
        old = {_memory(tensor) for tensor in given}
        here = [tensor for tensor in made if tensor.device.type == self.device]
        new = {_memory(tensor) for tensor in here if tensor.numel()} - old
        involved = {tensor.device.type for tensor in (*given, *made)}
        if self.device not in involved or name == "aten::bincount":
            return
        self.allocated += [name] * len(new)  # of what was drawn: the copy of it
        if name in READS and not all(map(self.is_on_host, given)):
            self.waited.append(name)
        elif name in COPIES and len(involved) > 1:
            self.waited += [name] * (not here and not asynchronous)
        elif not (func.is_view or draws or name.startswith(EMPTY)):
            self.launched.append(name)


class Quiet(nn.Module):
    """A module that is not counted, forward or backward: each row of its output is a parameter.

    `logits` [N, columns], one way or the other, are added where it is a gate.
    """

    def __init__(self, counter: Counter, columns: int, logits: Tensor | None = None) -> None:
        super().__init__()
        self.counter = counter
        self.logits = logits
        self.row = nn.Parameter(torch.zeros(1, columns, device=counter.device))

    def forward(self, *inputs: Any) -> Tensor:
        return _Quiet.apply(self.counter, self.logits, self.row, *_tensors(inputs))


class _Quiet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counter, logits, row, *inputs):
        ctx.counter = counter
        with counter.pause():
            count = inputs[0].shape[0]
            output = inputs[0].new_zeros(count, row.shape[1]) + row
            return output if logits is None else output + logits[:count]

    @staticmethod
    def backward(ctx, grad):
        with ctx.counter.pause():
            return None, None, grad.sum(0, keepdim=True), *[None] * (len(ctx.needs_input_grad) - 3)


def taking_turns(rows: int, columns: int, device: str) -> Tensor:
    """Logits [rows, columns]: row n decides for column n modulo columns."""
    return 2 * F.one_hot(torch.arange(rows) % columns, columns).float().to(device)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
