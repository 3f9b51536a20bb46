"""How often the host reads what the device computed, and so waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


def waits(run: Callable[[], object]) -> int:
    """Reads of tensors by the host in ``run()``; on a CPU those that would wait on a GPU.

    The modules' own reads count, such as `.item()` in a branch.
    """
    tolist, synchronize = Tensor.tolist, torch.cuda.Event.synchronize
    count = _Counting()

    def read(tensor: Tensor) -> Any:
        count.waits += 1
        return tolist(tensor)

    def wait(event: torch.cuda.Event) -> None:
        count.waits += 1
        synchronize(event)

    Tensor.tolist, torch.cuda.Event.synchronize = read, wait  # type: ignore[assignment,method-assign]
    try:
        with count:
            run()
    finally:
        Tensor.tolist, torch.cuda.Event.synchronize = tolist, synchronize  # type: ignore[method-assign]
    return count.waits


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _READS:
            self.waits += 1
        elif name in ("aten::_to_copy", "aten::copy_"):
            source = args[name == "aten::copy_"]
            asynchronous = (kwargs or {}).get("non_blocking") or True in args[2:]
            self.waits += source.is_cuda and not result.is_cuda and not asynchronous
        return result
