"""Tensors for the tests: every dtype with random bits, every awkward layout, rows as bytes."""

import math
from collections.abc import Callable

import oracle
import torch
from torch import Tensor

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8]
DTYPES = [*FLOATS, *INTEGERS, torch.bool, torch.complex64, torch.complex128]
DTYPES += [getattr(torch, name) for name in ("float8_e4m3fn",) if hasattr(torch, name)]

# (selection, number of branches): what the tests of values and gradients are run over.
SELECTIONS: dict[str, tuple[list, int]] = {
    "top1": ([0, 2, 1, 0, 2, 2, 1], 3),
    "top1 with holes, branches 1 and 2 starved": ([3, -1, 0, 3, -1, 0], 4),
    "all to one": ([1, 1, 1, 1], 2),
    "one row": ([0], 1),
    "no sample has a branch": ([-1, -1, -1], 2),
    "top2": ([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2]], 3),
    "top3 with holes and repeats": ([[0, -1, 0], [-1, -1, -1], [3, 1, 3], [1, 1, 1]], 4),
    "mask": (
        [[True, False, True], [False, False, False], [True, True, True], [False, True, False]],
        3,
    ),
}
TOP1 = [name for name, (selection, _) in SELECTIONS.items() if not isinstance(selection[0], list)]


def selection_of(name: str) -> tuple[Tensor, int]:
    selection, num_branches = SELECTIONS[name]
    return torch.tensor(selection), num_branches


def oracle_plan(selection: Tensor, num_branches: int) -> oracle.Plan:
    ranks = selection.shape[1] if selection.dim() == 2 else 1
    return oracle.route(selection.tolist(), num_branches, ranks)


def random_selection(rows: int, ranks: int, num_branches: int, holes: float = 0.2) -> Tensor:
    selection = torch.randint(0, num_branches, (rows, ranks))
    return selection.masked_fill(torch.rand(rows, ranks) < holes, -1)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bit pattern the dtype has: NaN with payloads, infinities, denormals, both zeros."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    count = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def random_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers whose small sums stay in range; integers also longer than a float's mantissa."""
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float64).to(dtype)
    high = {8: 2**60, 4: 2**28, 2: 2**12, 1: 40}[dtype.itemsize]
    return torch.randint(0 if dtype is torch.uint8 else -high, high, shape).to(dtype)


def row_bytes(tensor: Tensor) -> list[bytes]:
    """The rows of a tensor, bit by bit."""
    rows = tensor.shape[0]
    if tensor.numel() == 0:
        return [b""] * rows
    plain = (
        tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    )
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    size = len(data) // rows
    return [data[i * size : (i + 1) * size] for i in range(rows)]


def row_values(tensor: Tensor) -> list[list]:
    """The rows of a tensor as flat lists of Python numbers."""
    if tensor.numel() == 0:
        return [[] for _ in range(tensor.shape[0])]
    return tensor.detach().reshape(tensor.shape[0], -1).tolist()


def zero_bytes(tensor: Tensor) -> bytes:
    return bytes(math.prod(tensor.shape[1:]) * tensor.dtype.itemsize)


def misaligned(tensor: Tensor) -> Tensor:
    """A copy that starts one byte after an aligned address."""
    if tensor.numel() == 0:
        return tensor
    # PyTorch's own copy of a misaligned complex128 crashes: that one stays aligned.
    offset = 16 if tensor.dtype is torch.complex128 else 1
    data = bytearray(bytes(offset) + b"".join(row_bytes(tensor)))
    raw = torch.frombuffer(data, dtype=torch.uint8, offset=offset)
    return raw.view(tensor.dtype).reshape(tensor.shape)


def byte_slice(tensor: Tensor) -> Tensor:
    """A copy that starts one element into a byte buffer: aligned to its dtype, not to 16 bytes."""
    size = tensor.dtype.itemsize
    buffer = torch.zeros((tensor.numel() + 1) * size, dtype=torch.uint8)
    view = buffer[size:].view(tensor.dtype).reshape(tensor.shape)
    return view.copy_(tensor)


def wider_table(tensor: Tensor) -> Tensor:
    """A copy in a table of one column more: its rows stand at a gap that is no multiple of one."""
    size = math.prod(tensor.shape[1:])
    table = tensor.new_zeros(tensor.shape[0], size + 1)
    return table[:, :size].view(tensor.shape).copy_(tensor)


def reversed_strides(tensor: Tensor) -> Tensor:
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


# Layouts keep the shape and dtype; the expanded ones repeat some of the values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "byte slice": byte_slice,
    "misaligned": misaligned,
    "columns of a wider table": wider_table,
    "every other row": lambda x: torch.stack([x, x], dim=1)[:, 0],
    "every other column": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "reversed strides": reversed_strides,
    "one row expanded": lambda x: x[:1].expand(x.shape),
    "one column expanded": lambda x: x[..., :1].expand(x.shape),
    "one value expanded": lambda x: x.reshape(-1)[0].expand(x.shape),
}
