"""One recorded call of a branch: the tensors it reads, and how a batch gets in and out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import tree
from .watch import Refused


class Call:
    """What a branch is called with.

    Attributes:
        leaves, spec: the arguments, flat.
        rows: positions of the per-sample leaves.
        num_rows, device: of these.
        kind: what a recording for it must have been made for. Tensors that are one and the same
            (q = k = v) stay so.
    """

    __slots__ = ("device", "kind", "leaves", "num_rows", "rows", "spec")

    def __init__(self, arguments: Sequence[Any], rows: Sequence[int] | None) -> None:
        if not rows:
            raise Refused("reads a Lazy input, or no rows at all")
        self.leaves, self.spec = tree.flatten(tuple(arguments))
        self.rows = rows
        first = self.leaves[rows[0]]
        self.num_rows, self.device = first.shape[0], first.device
        seen: dict[tuple[int, bool], int] = {}
        kinds: list[Any] = [self.spec]
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                if type(leaf) is not Tensor and type(leaf) is not nn.Parameter:
                    raise Refused(f"reads a {type(leaf).__name__}, not a plain tensor")
                split = i in rows
                place = seen.setdefault((id(leaf), split), i)
                shape = leaf.shape[1:] if split else leaf.shape
                kinds.append((place, split, shape, leaf.dtype, leaf.device, _layout(leaf)))
            else:
                kinds.append((type(leaf), leaf))
        if torch.is_autocast_enabled(self.device.type):
            kinds.append(torch.get_autocast_dtype(self.device.type))
        self.kind = tuple(kinds)

    def buffers(self, size: int) -> list[Any]:
        """The leaves with room for `size` rows, filled."""
        buffers: list[Any] = []
        for i, leaf in enumerate(self.leaves):
            place = self._first(i)
            if not isinstance(leaf, Tensor):
                buffers.append(leaf)
            elif place < i:
                buffers.append(buffers[place])
            else:
                shape = (size, *leaf.shape[1:]) if i in self.rows else leaf.shape
                new = torch.empty(shape, dtype=leaf.dtype, device=leaf.device)
                buffers.append(new.to(memory_format=_layout(leaf)))
        self.fill(buffers)
        return buffers

    def fill(self, buffers: Sequence[Any]) -> None:
        """Copies the tensors in, and the first row into the places left over."""
        for i, leaf in enumerate(self.leaves):
            if not isinstance(leaf, Tensor) or self._first(i) < i:
                continue
            buffer, count = buffers[i], self.num_rows
            if i not in self.rows:
                buffer.copy_(leaf)
            elif len(buffer) <= count:
                buffer.copy_(leaf[: len(buffer)])
            else:
                buffer[:count].copy_(leaf)
                buffer[count:].copy_(leaf[:1])

    def _first(self, i: int) -> int:
        """Where the tensor of leaf `i` comes first."""
        kind = self.kind[i + 1]
        return kind[0] if isinstance(self.leaves[i], Tensor) else i


class Recording(NamedTuple):
    """A recorded call, and the tensors that it reads."""

    inputs: list[Any]
    run: Callable[[], Any]

    def play(self, call: Call) -> Any:
        """The output for `call`, in memory of its own."""
        call.fill(self.inputs)
        leaves, spec = tree.flatten(self.run())
        count = call.num_rows
        return tree.unflatten(
            [leaf[:count].clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        )


def _layout(tensor: Tensor) -> torch.memory_format:
    """Channels first or last; anything else is made contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if last and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format
