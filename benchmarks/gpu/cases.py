"""Calls of every op: large ones to time, small and odd ones to check and to sanitise.

The ops come from the registry. One that has no cases here gets the good calls of its tests, so that
a new op is checked, sanitised and timed from its first day.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.harvest import ROOT
from dynmm_kernels import ops
from dynmm_kernels.ops.checks import ENERGY
from dynmm_kernels.ops.reference.energy import in_plain_torch
from dynmm_kernels.ops.schemas import OPS

sys.path.insert(0, str(ROOT / "tests/ops"))
from test_raw_ops import good_calls

Arguments = tuple[Any, ...]
EAGER = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    op: str
    title: str
    make: Callable[[], Arguments]
    """The op's arguments, every time in memory of their own."""
    torch: Callable[..., Any] | None = None
    """What one writes in plain PyTorch, of the same arguments; gives the first results."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def moved_bytes(arguments: Any, results: Any) -> int:
    """Each tensor once: no kernel can move less."""
    found = {t.data_ptr(): t.nbytes for t in tensors_in((arguments, results)) if t.numel()}
    return sum(found.values())


def difference(op: str, got: Any, wanted: Any) -> str | None:
    """What is wrong with the results of an op: bit for bit where rows move, else roundings."""
    ours, theirs = ([*tensors_in(results)] for results in (got, wanted))
    if len(ours) != len(theirs):
        return f"{len(ours)} results, wanted {len(theirs)}"
    for mine, other in zip(ours, theirs, strict=True):
        tolerance = 0.0
        if OPS[op].sums and other.is_floating_point() and other.numel():
            largest = other.abs().double().nan_to_num(0, 0, 0).max().item()
            tolerance = 64 * torch.finfo(other.dtype).eps * max(1.0, largest)
        try:
            torch.testing.assert_close(
                mine.to(other.device), other, rtol=0, atol=tolerance, equal_nan=True
            )
        except AssertionError as error:
            return " ".join(str(error).split())
    return None


def to_device(value: Any, device: str) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(to_device(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def cases(device: str, small: bool = False, only: Sequence[str] = ()) -> Iterator[Case]:
    """Of every registered op, or of `only` some."""
    for op in only or OPS:
        own = MAKERS.get(op)
        yield from own(device, small) if own else good_cases(op, device)


def good_cases(op: str, device: str) -> Iterator[Case]:
    for i, arguments in enumerate(good_calls(op)):
        yield Case(op, f"good call {i}", partial(to_device, arguments, device))


def randn(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan_of(rows: int, branches: int, device: str, ranks: int = 1) -> tuple[Tensor, Tensor, list]:
    """order, inverse and the offsets of a random plan without holes."""
    choice = torch.randint(branches, (rows, ranks))
    with ops.backend("reference"):
        order, inverse, header = ops.kernels().route(choice, branches)
    return order.to(device), inverse.to(device), header.tolist()[: branches + 1]


def route(device: str, small: bool) -> Iterator[Case]:
    large_sizes = ((1024, 2), (16_384, 8), (65_536, 2), (1_000_000, 256))
    for rows, branches in ((67, 2), (1025, 8), (20_011, 256)) if small else large_sizes:
        yield Case(
            *("route", f"N={rows} B={branches}"),
            lambda n=rows, b=branches: (torch.randint(b, (n,), device=device), b),
            lambda choice, b: torch.sort(choice, stable=True).indices.int(),
        )


def route_argmax(device: str, small: bool) -> Iterator[Case]:
    def plain(logits: Tensor) -> list[Tensor]:
        choice = logits.argmax(1)
        return [choice, torch.sort(choice, stable=True).indices.int()]

    for rows, branches in ((67, 5), (20_011, 3)) if small else ((128, 2), (65_536, 2)):
        yield Case(
            *("route_argmax", f"N={rows} B={branches}"),
            lambda n=rows, b=branches: (randn(n, b, device=device),),
            plain,
        )


def rows_of(small: bool) -> tuple[tuple[int, int, torch.dtype], ...]:
    """(rows, values, dtype): units of 16, 4, 2 and 1 bytes, and a batch that is launch-bound."""
    if small:
        kinds = (torch.float32, torch.float16, torch.uint8)
        return tuple((67, width, kind) for width in (1024, 23) for kind in kinds)
    return (
        (4096, 4096, torch.float32),
        (1_000_000, 23, torch.float32),
        (1_000_000, 23, torch.float16),
        (512, 151_875, torch.uint8),
        (128, 1024, torch.float32),
    )


def values_of(rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    if dtype is torch.uint8:
        return torch.randint(256, (rows, width), dtype=dtype, device=device)
    return randn(rows, width, device=device, dtype=dtype)


def weighted_rows(small: bool) -> tuple[tuple[int, int, torch.dtype], ...]:
    rows, width = (67, 259) if small else (4096, 4096)
    return tuple((rows, width, dtype) for dtype in EAGER[:2])


def gather_rows(device: str, small: bool) -> Iterator[Case]:
    def call(rows: int, width: int, dtype: torch.dtype) -> Arguments:
        order, _, _ = plan_of(rows, 2, device)
        return [values_of(rows, width, dtype, device)], [0], [rows], order, 1

    def scaled(rows: int, width: int, dtype: torch.dtype) -> Arguments:
        return *call(rows, width, dtype), torch.rand(rows, 1, device=device)

    for size in rows_of(small):
        yield Case(
            *("gather_rows", told(*size)),
            partial(call, *size),
            lambda sources, starts, stops, order, ranks: sources[0].index_select(0, order),
        )
    for size in weighted_rows(small):
        yield Case("gather_rows", f"weighted {told(*size)}", partial(scaled, *size))


def told(rows: int, width: int, dtype: torch.dtype) -> str:
    return f"{rows} x {width * dtype.itemsize} B {name_of(dtype)}"


def combine_rows(device: str, small: bool) -> Iterator[Case]:
    def call(rows: int, width: int, dtype: torch.dtype, branches: int = 2) -> Arguments:
        _, inverse, starts = plan_of(rows, branches, device)
        outputs = values_of(rows, width, dtype, device).split(sizes_of(starts))
        return [part.clone() for part in outputs], starts[:-1], inverse

    def weighted(rows: int, width: int, dtype: torch.dtype) -> Arguments:
        _, inverse, starts = plan_of(rows, 2, device, ranks=2)
        outputs = values_of(2 * rows, width, dtype, device).split(sizes_of(starts))
        parts = [part.clone() for part in outputs]
        return parts, starts[:-1], inverse, torch.rand(rows, 2, device=device)

    for size in rows_of(small):
        yield Case(
            *("combine_rows", told(*size)),
            partial(call, *size),
            lambda outputs, starts, inverse: torch.cat(outputs).index_select(0, inverse[:, 0]),
        )
    yield Case("combine_rows", "300 outputs", partial(call, 900, 259, torch.float32, 300))
    for size in weighted_rows(small):
        yield Case("combine_rows", f"k=2 {told(*size)}", partial(weighted, *size))


def sizes_of(starts: list[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(starts)]


def row_dots(device: str, small: bool) -> Iterator[Case]:
    def call(rows: int, width: int, dtype: torch.dtype) -> Arguments:
        _, inverse, starts = plan_of(rows, 2, device)
        outputs = randn(rows, width, device=device, dtype=dtype).split(sizes_of(starts))
        grad = randn(rows, width, device=device, dtype=dtype)
        return grad, [part.clone() for part in outputs], starts[:-1], inverse

    large_sizes = ((16_384, 1024), (131_072, 23))
    for rows, width in ((67, 259), (67, 23)) if small else large_sizes:
        yield Case(
            *("row_dots", told(rows, width, torch.float32)),
            partial(call, rows, width, torch.float32),
            lambda grad, outputs, starts, inverse: (
                grad * torch.cat(outputs).index_select(0, inverse[:, 0])
            ).sum(1, keepdim=True),
        )


def maps_of(device: str, small: bool) -> Iterator[tuple[str, Callable[..., list[Tensor]], int]]:
    """(title, rows -> so many maps, active samples) of each layout and dtype."""
    shape = (3, 33, 4, 7) if small else (8, 512, 60, 80)
    formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    for layout, memory_format in formats.items():
        for dtype in EAGER:

            def maps(*rows: int, dtype=dtype, memory_format=memory_format) -> list[Tensor]:
                return [
                    randn(n, *shape[1:], device=device, dtype=dtype).to(memory_format=memory_format)
                    for n in rows
                ]

            active = shape[0] - 1 if small else shape[0]
            yield f"{'x'.join(map(str, shape))} {name_of(dtype)} {layout}", maps, active


def factors(number: int, like: Tensor, active: int) -> list[Tensor]:
    return [torch.rand(active, like.shape[1], device=like.device) for _ in range(number)]


def scaled(maps: Tensor, factor: Tensor) -> Tensor:
    return maps * factor.to(maps.dtype)[:, :, None, None]


def se_add(device: str, small: bool) -> Iterator[Case]:
    for title, maps, active in maps_of(device, small):

        def call(maps=maps, active=active) -> Arguments:
            main, aux = maps(3 if small else 8, active)
            return main, aux, *factors(2, main, active)

        def plain(main: Tensor, aux: Tensor, main_scale: Tensor, aux_scale: Tensor) -> Tensor:
            active = len(aux)
            head = scaled(main[:active], main_scale) + scaled(aux, aux_scale)
            return head if active == len(main) else torch.cat([head, main[active:]])

        yield Case("se_add", title, call, plain)


def se_add_means(device: str, small: bool) -> Iterator[Case]:
    for title, maps, active in maps_of(device, small):
        call = lambda maps=maps, active=active: (maps(active)[0],)  # noqa: E731
        yield Case("se_add_means", title, call, lambda x: x.mean((2, 3), dtype=torch.float32))


def se_add_dots(device: str, small: bool) -> Iterator[Case]:
    for title, maps, active in maps_of(device, small):
        call = lambda maps=maps, active=active: maps(active, active, active)  # noqa: E731
        yield Case(
            *("se_add_dots", title, call),
            lambda grad, main, aux: [
                (grad * x).sum((2, 3), dtype=torch.float32) for x in (main, aux)
            ],
        )


def se_add_grads(device: str, small: bool) -> Iterator[Case]:
    for title, maps, active in maps_of(device, small):

        def call(maps=maps, active=active) -> Arguments:
            (grad,) = maps(3 if small else 8)
            return grad, *factors(4, grad, active)

        def plain(grad: Tensor, *four: Tensor) -> list[Tensor]:
            shifts = [shift.to(grad.dtype)[:, :, None, None] for shift in four[2:]]
            active = len(four[0])
            main, aux = (
                scaled(grad[:active], scale) + shift
                for scale, shift in zip(four[:2], shifts, strict=True)
            )
            return [main if active == len(grad) else torch.cat([main, grad[active:]]), aux]

        yield Case("se_add_grads", title, call, plain)


def energy_sizes(small: bool) -> Iterator[tuple[int, int, torch.dtype]]:
    for rows, classes in ((67, 5), (33, 101)) if small else ((128, 23), (65_536, 101)):
        for dtype in EAGER[:2]:
            yield rows, classes, dtype


def energy_call(rows: int, classes: int, dtype: torch.dtype, device: str) -> Arguments:
    logits = [randn(rows, classes, device=device, dtype=dtype) for _ in range(2)]
    return logits, torch.randint(classes, (rows,), device=device), None, None, ENERGY, 0.1


def energy_fuse(device: str, small: bool) -> Iterator[Case]:
    for rows, classes, dtype in energy_sizes(small):
        title = f"M=2 N={rows} C={classes} {name_of(dtype)}"
        make = partial(energy_call, rows, classes, dtype, device)
        yield Case("energy_fuse", title, make, in_plain_torch)


def energy_fuse_grads(device: str, small: bool) -> Iterator[Case]:
    def call(rows: int, classes: int, dtype: torch.dtype) -> Arguments:
        forward = energy_call(rows, classes, dtype, device)
        fused, confidence, losses, energies = in_plain_torch(*forward)
        return *forward, False, energies, fused, torch.ones_like(confidence), losses

    for rows, classes, dtype in energy_sizes(small):
        title = f"M=2 N={rows} C={classes} {name_of(dtype)}"
        make = partial(call, rows, classes, dtype)
        yield Case("energy_fuse_grads", title, make, OPS["energy_fuse_grads"].reference)


MAKERS: dict[str, Callable[[str, bool], Iterator[Case]]] = {
    maker.__name__: maker
    for maker in (
        *(route, route_argmax, gather_rows, combine_rows, row_dots),
        *(se_add, se_add_means, se_add_dots, se_add_grads, energy_fuse, energy_fuse_grads),
    )
}
