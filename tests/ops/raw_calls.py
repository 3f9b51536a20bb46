"""Calls of the ops as they stand in torch.ops, right and wrong ones: nobody checked the arguments.

Whatever is passed, every backend gives the reference's result or refuses in the reference's words.
From the root, `python -m tests.ops.raw_calls --calls 10000 --seed 0` tries random calls on the
compiled kernels.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dynmm_kernels.ops import reference
from dynmm_kernels.ops.checks import GIVEN
from dynmm_kernels.ops.schemas import OPS

Call = tuple[str, list[Any]]  # op, arguments
Run = Callable[..., Any]

MOVED = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
OTHERS = (torch.bool, torch.complex64, torch.int16, torch.int8, torch.uint16, torch.uint64)
FLOATS = MOVED[:4]
NUMBERS = (-(2**63), -1, 0, 1, 2, 7, 2**20, 2**20 + 1, 2**31 - 1, 2**31, 2**62, 2**63 - 1)


def run_reference(op: str, *arguments: Any) -> Any:
    return getattr(reference, op)(*arguments)


def run_dispatched(op: str, *arguments: Any) -> Any:
    return getattr(torch.ops.dynmm_kernels, op)(*arguments)


def outcome(run: Run, call: Call) -> list[Tensor] | str:
    """The results, or the words of the refusal; any other exception is a fault."""
    op, arguments = call
    try:
        results = run(op, *arguments)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return flat(results)


def flat(results: Any) -> list[Tensor]:
    """The tensors that an op returned, those in lists too."""
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results for tensor in flat(result)]


def difference(run: Run, call: Call) -> str | None:
    """What `run` makes otherwise of a call than the reference, or None."""
    wanted, got = outcome(run_reference, call), outcome(run, call)
    if isinstance(wanted, str) or isinstance(got, str):
        if got == wanted:
            return None if wanted.startswith(f"{call[0]}: ") else f"not said by a check: {wanted}"
        return f"wanted {_short(wanted)}; got {_short(got)}"
    if len(got) != len(wanted):
        return f"wanted {len(wanted)} results; got {len(got)}"
    for ours, theirs in zip(got, wanted, strict=True):
        try:
            _compare(call[0], ours, theirs)
        except AssertionError as error:
            return str(error)
    return None


def _compare(op: str, ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape, f"shapes {list(ours.shape)} and {list(theirs.shape)}"
    for size, a, b in zip(ours.shape, ours.stride(), theirs.stride(), strict=True):
        assert size <= 1 or ours.numel() == 0 or a == b, f"{ours.stride()}, {theirs.stride()}"
    tolerance = 0.0
    if OPS[op].sums and theirs.dtype in (*FLOATS, torch.complex64) and theirs.numel():
        largest = theirs.abs().double().nan_to_num(0, 0, 0).max().item()
        tolerance = 32 * torch.finfo(theirs.dtype).eps * max(1.0, largest)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)


def _short(result: list[Tensor] | str) -> str:
    return repr(result) if isinstance(result, str) else told(result)


def told(value: Any) -> str:
    """A call or a result, short enough to read."""
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        values = f" {value.tolist()}" if value.dtype == torch.int32 and not where else ""
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"{str(value.dtype)[6:]}{list(value.shape)} strides {strides}{where}{values}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(told, value))}]"
    return repr(value)


class Maker:
    """Random calls: right ones, and right ones with a few arguments spoilt."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def call(self) -> Call:
        op = self.random.choice([*OPS])
        arguments = getattr(self, op)()
        for _ in range(self.random.choice((0, 0, 1, 1, 1, 2))):
            self.spoil(arguments)
        return op, arguments

    def size(self, least: int = 0) -> int:
        return self.random.choice((least, 1, 2, 3, 5, 8, 33))

    def values(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Some numbers of `dtype`, somehow laid out."""
        if dtype.is_floating_point or dtype.is_complex:
            wide = torch.complex64 if dtype.is_complex else torch.float32
            tensor = torch.randn(shape, generator=self.torch, dtype=wide).to(dtype)
        else:
            tensor = torch.randint(0, 2, shape, generator=self.torch).to(dtype)
        return self.laid_out(tensor)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same values otherwise in memory."""
        way = self.random.randrange(6) if tensor.ndim else 0
        if way == 1:
            return torch.stack([tensor, tensor], dim=-1)[..., 0]
        if way == 2:
            return torch.cat([tensor, tensor])[tensor.shape[0] :]
        if way == 3:
            axes = tuple(reversed(range(tensor.ndim)))
            return tensor.permute(axes).contiguous().permute(axes)
        if way == 4 and tensor.ndim == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        if way == 5 and tensor.shape[0]:
            return tensor[:1].expand(tensor.shape)
        return tensor

    def index(self, shape: tuple[int, ...], highest: int) -> Tensor:
        """int32, most of it in -1..highest, a little beyond on both sides."""
        index = torch.randint(-2, highest + 2, shape, generator=self.torch, dtype=torch.int32)
        if index.numel() and self.random.random() < 0.2:
            at = self.random.randrange(index.numel())
            index.view(-1)[at] = self.random.choice((-(2**31), 2**31 - 1, 2**20))
        return self.laid_out(index)

    def inner(self) -> tuple[int, ...]:
        return self.random.choice(((), (3,), (2, 3), (8,), (0,), (2, 3, 2), (67,)))

    def factor_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def route(self) -> list[Any]:
        rows, branches = self.size(), self.size(1)
        if self.random.random() < 0.3:
            return [self.values((rows, branches), torch.bool), branches]
        shape = (rows,) if self.random.random() < 0.3 else (rows, self.random.randrange(1, 4))
        selection = torch.randint(-2, branches + 1, shape, generator=self.torch)
        dtypes = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        return [self.laid_out(selection.to(self.random.choice(dtypes))), branches]

    def route_argmax(self) -> list[Any]:
        logits = self.values((self.size(), self.size(1)), self.random.choice(FLOATS))
        if logits.numel() and self.random.random() < 0.3:
            at = self.random.randrange(logits.shape[0])
            logits = logits.clone()
            logits[at] = self.random.choice((float("nan"), float("inf"), float("-inf")))
        return [logits]

    def gather_rows(self) -> list[Any]:
        rows, ranks, count = self.size(), self.random.randrange(1, 4), self.random.randrange(4)
        weighted = self.random.random() < 0.4
        dtype = self.random.choice(FLOATS if weighted else MOVED)
        order = self.index((self.size(),), rows * ranks)
        spans = [sorted(self.random.choices(range(len(order) + 1), k=2)) for _ in range(count)]
        sources = [self.values((rows, *self.inner()), dtype) for _ in spans]
        weights = self.values((len(order),), self.factor_dtype(dtype)) if weighted else None
        return [sources, [a for a, _ in spans], [b for _, b in spans], order, ranks, weights]

    def outputs(self, dtype: torch.dtype) -> tuple[list[Tensor], list[int], Tensor]:
        """Outputs, with gaps here and there, and slots to look up."""
        inner, outputs, starts, slot = self.inner(), [], [], 0
        for _ in range(self.random.choice((1, 2, 3, 9, 17))):
            slot += self.random.choice((0, 0, 1, 4))
            outputs.append(self.values((self.random.choice((0, 1, 2, 5)), *inner), dtype))
            starts.append(slot)
            slot += outputs[-1].shape[0]
        return outputs, starts, self.index((self.size(), self.random.randrange(1, 4)), slot)

    def combine_rows(self) -> list[Any]:
        weighted = self.random.random() < 0.4
        dtype = self.random.choice(FLOATS if weighted else MOVED)
        outputs, starts, inverse = self.outputs(dtype)
        weights = self.values(tuple(inverse.shape), self.factor_dtype(dtype)) if weighted else None
        return [outputs, starts, inverse, weights]

    def row_dots(self) -> list[Any]:
        dtype = self.random.choice(FLOATS)
        outputs, starts, inverse = self.outputs(dtype)
        return [self.values((len(inverse), *outputs[0].shape[1:]), dtype), outputs, starts, inverse]

    def maps(self, count: int) -> tuple[list[Tensor], tuple[int, ...], torch.dtype]:
        shape = (self.size(), self.size(), *self.random.choice(((), (3,), (2, 3), (5, 4))))
        dtype = self.random.choice(FLOATS)
        return [self.values(shape, dtype) for _ in range(count)], shape, dtype

    def factors(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        return [self.values(shape[:2], self.factor_dtype(dtype)) for _ in range(count)]

    def se_add(self) -> list[Any]:
        (main, aux), shape, dtype = self.maps(2)
        active = self.random.randrange(shape[0] + 1)
        return [main, aux[:active], *self.factors(2, (active, shape[1]), dtype)]

    def se_add_means(self) -> list[Any]:
        return self.maps(1)[0]

    def se_add_dots(self) -> list[Any]:
        (grad, main, aux), shape, _ = self.maps(3)
        return [grad, main, aux[: self.random.randrange(shape[0] + 1)]]

    def se_add_grads(self) -> list[Any]:
        (grad,), shape, dtype = self.maps(1)
        active = self.random.randrange(shape[0] + 1)
        return [grad, *self.factors(4, (active, shape[1]), dtype)]

    def energy_fuse(self) -> list[Any]:
        rows, classes = self.size(), self.random.choice((1, 2, 3, 10, 67, 1025))
        modalities, dtype = self.random.choice((1, 2, 2, 3, 8)), self.random.choice(FLOATS)
        factors = self.factor_dtype(dtype)
        targets = present = weights = None
        kind = self.random.randrange(3)
        if kind == 1:
            targets = torch.randint(-1, classes + 1, (rows,), generator=self.torch)
        if kind == 2:
            targets = self.values((rows, classes), factors).sigmoid()
        if self.random.random() < 0.5:
            present = self.values((rows, modalities), torch.bool)
        weighting = self.random.randrange(4)
        if weighting == GIVEN:
            weights = self.values((rows, modalities), factors)
        logits = [self.values((rows, classes), dtype) for _ in range(modalities)]
        return [logits, targets, present, weights, weighting, self.random.choice((0.1, 1.0))]

    def energy_fuse_grads(self) -> list[Any]:
        arguments = self.energy_fuse()
        energies = reference.energy_fuse(*arguments)[3]
        logits, targets = arguments[:2]
        shapes = [(logits[0].shape, logits[0].dtype), (energies[:, 1:].shape, energies.dtype)]
        if targets is not None:
            shapes.append((energies.shape, energies.dtype))
        grads = [
            self.values(tuple(shape), dtype) if self.random.random() < 0.7 else None
            for shape, dtype in shapes
        ]
        grads += [None] * (3 - len(grads))
        return [*arguments, self.random.random() < 0.5, energies, *grads]

    def spoil(self, arguments: list[Any]) -> None:
        at = self.random.randrange(len(arguments))
        value = arguments[at]
        if isinstance(value, Tensor):
            arguments[at] = self.spoilt(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            arguments[at] = self.random.choice(NUMBERS)
        elif isinstance(value, list):
            arguments[at] = self.spoilt_list(value)
        elif value is None:
            arguments[at] = self.values((self.size(),), self.random.choice(MOVED))

    def spoilt_list(self, values: list[Any]) -> list[Any]:
        values = list(values)
        if not values or self.random.random() < 0.3:
            return values[: self.random.randrange(len(values) + 1)]
        at = self.random.randrange(len(values))
        if isinstance(values[at], Tensor):
            values[at] = self.spoilt(values[at])
        else:
            near = values[at] + self.random.choice((-1, 1, 2))
            values[at] = self.random.choice((near, near, *NUMBERS))
        return values

    def spoilt(self, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:
            return tensor
        way = self.random.randrange(8)
        if way == 0:
            return tensor.to(self.random.choice((*MOVED, *OTHERS, torch.int32)))
        if way == 1:
            return tensor.to("meta")
        if way == 2:
            return tensor[..., None]
        if way == 3 and tensor.numel():
            return tensor.reshape(-1)[0]
        if way == 4 and tensor.ndim:
            return torch.cat([tensor, tensor])
        if way == 5 and tensor.ndim:
            return tensor[:-1]
        if way == 6 and tensor.ndim:
            return tensor[..., :-1]
        if way == 7 and not tensor.is_meta:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, layout=torch.sparse_coo)
        return self.laid_out(tensor)


def tensors_of(call: Call) -> list[Tensor]:
    flat = [x for value in call[1] for x in (value if isinstance(value, list) else [value])]
    return [x for x in flat if isinstance(x, Tensor)]


def dtypes(call: Call) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors_of(call)}


def has_values(call: Call) -> bool:
    """Whether there is a CPU tensor: calls of meta tensors alone have nothing to compare."""
    return any(tensor.is_cpu for tensor in tensors_of(call))


def random_calls(count: int, seed: int) -> Iterator[Call]:
    maker = Maker(seed)
    made = 0
    while made < count:
        call = maker.call()
        if has_values(call):
            made += 1
            yield call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    refused = wrong = 0
    for number, call in enumerate(random_calls(options.calls, options.seed)):
        refused += isinstance(outcome(run_reference, call), str)
        problem = difference(run_dispatched, call)
        if problem:
            wrong += 1
            print(f"call {number} of seed {options.seed}: {call[0]}{told(call[1])}\n  {problem}")
    print(f"{options.calls} calls, {refused} refused, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
