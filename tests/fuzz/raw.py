"""The ops themselves, called with right and wrong arguments, each case in a child process.

Wrong arguments give an error or a result, never a crash; and what the default backend makes of
them, the reference makes of them as well.
"""

import ctypes
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import dynmm_kernels
from dynmm_kernels import ops

from .compare import Mismatch, Refused, close, require
from .draw import LAYOUTS, Draw, laid_out

OPS = torch.ops.dynmm_kernels
M_PERTURB = -6


def case(draw: Draw) -> None:
    """Draws, calls and compares in a child; what it finds, or how it died, is raised here."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        say(writing, outcome(draw))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    draw_arguments(draw)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        raise Mismatch(f"{draw.features['op']} {draw.features['fault']} crashed: {name}")
    if said.startswith("refused"):
        raise Refused(said)
    if said != "agreed":
        raise Mismatch(said)


def say(pipe: int, words: str) -> None:
    os.write(pipe, words.encode()[:2000])
    os._exit(0)


def outcome(draw: Draw) -> str:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_PERTURB, 0xA5)
    try:
        return compared(draw)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def compared(draw: Draw) -> str:
    name, arguments = draw_arguments(draw)
    results = []
    for backend in (None, "reference"):
        try:
            if backend:
                with dynmm_kernels.backend(backend):
                    result = getattr(OPS, name)(*arguments)
            else:
                result = getattr(OPS, name)(*arguments)
        except Exception as error:
            result = error
        results.append(result)
    mine, reference = results
    where = f"{name} with {draw.features['fault']}"
    if isinstance(mine, Exception) or isinstance(reference, Exception):
        both = isinstance(mine, Exception) and isinstance(reference, Exception)
        require(both, f"{where}: refused by", type(mine).__name__, type(reference).__name__)
        return f"refused {mine}"
    pairs = zip(as_list(mine), as_list(reference), strict=True)
    for index, (got, wanted) in enumerate(pairs):
        require(got.shape == wanted.shape, f"{where}: shape {index}", got.shape, wanted.shape)
        require(got.dtype == wanted.dtype, f"{where}: dtype {index}", got.dtype, wanted.dtype)
        require(got.device == wanted.device, f"{where}: device", got.device, wanted.device)
        if got.is_meta:
            continue
        close(f"{where}: result {index}", got.nan_to_num(7), wanted.nan_to_num(7), 1e-2)
    return "agreed"


def as_list(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in as_list(part)]


def plan_of(draw: Draw, rows: int, ranks: int, branches: int) -> tuple[Tensor, Tensor, list[int]]:
    """order, inverse and offsets, made here."""
    chosen = draw.integers(-1, branches, rows * ranks).tolist()
    order = [entry for b in range(branches) for entry, value in enumerate(chosen) if value == b]
    inverse = torch.full((rows * ranks,), -1, dtype=torch.int32)
    for slot, entry in enumerate(order):
        inverse[entry] = slot
    offsets = [sum(0 <= value < b for value in chosen) for b in range(branches + 1)]
    padded = torch.tensor(order + [-1] * (rows * ranks - len(order)), dtype=torch.int32)
    return padded, inverse.view(rows, ranks), offsets


def draw_arguments(draw: Draw) -> tuple[str, list[Any]]:
    """Right arguments of one op, then one of them spoilt."""
    rows, ranks, branches = draw.pick("rows", (3, 1, 0, 9)), draw.pick("ranks", (1, 2)), 3
    order, inverse, offsets = plan_of(draw, rows, ranks, branches)
    dtype = draw.pick("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    layout = draw.pick("layout", LAYOUTS)

    def floats(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return laid_out(draw.normal(*shape).to(of), layout)

    sizes = [stop - start for start, stop in pairwise(offsets)]
    outputs = [floats(size, 4) for size in sizes]
    active = min(rows, 2)
    weights = floats(rows, ranks, of=wide) if draw.pick("weights", (False, True)) else None
    name = draw.pick("op", tuple(sorted(ops.schemas.OPS)))
    maps, aux = floats(rows, 3, 2), floats(active, 3, 2)
    main_scale, aux_scale = floats(rows, 3, of=wide), floats(active, 3, of=wide)
    starts, stops = offsets[:-1], offsets[1:]
    scales = [main_scale[:active], aux_scale]
    targets = draw.integers(0, 4, rows) if draw.pick("targets", (True, False)) else None
    fused = [[floats(rows, 4), floats(rows, 4)], targets, draw.integers(0, 2, rows, 2) > 0, None, 1]
    losses = None if targets is None else floats(rows, 3, of=wide)
    incoming = [floats(rows, 4), floats(rows, 2, of=wide), losses]
    calls: dict[str, Callable[[], list[Any]]] = {
        "combine_rows": lambda: [outputs, starts, inverse, weights],
        "gather_rows": lambda: [[floats(rows, 4)] * 3, starts, stops, order, ranks, weights],
        "row_dots": lambda: [floats(rows, 4), outputs, starts, inverse],
        "route": lambda: [draw.integers(-1, branches, rows, ranks), branches],
        "route_argmax": lambda: [floats(rows, branches)],
        "se_add": lambda: [maps, aux, *scales],
        "se_add_means": lambda: [maps],
        "se_add_dots": lambda: [maps, floats(rows, 3, 2), aux],
        "se_add_grads": lambda: [maps, *scales, *scales],
        "energy_fuse": lambda: [*fused, 0.1],
        "energy_fuse_grads": lambda: [*fused, 0.1, False, floats(rows, 3, of=wide), *incoming],
    }
    arguments = calls[name]()
    return name, spoilt(draw, arguments)


def spoilt(draw: Draw, arguments: list[Any]) -> list[Any]:
    fault = draw.pick(
        "fault",
        ("nothing", "rank 0", "one rank more", "no rows", "a row less", "a row more", "wider",
         "int64", "int8", "half", "double", "huge values", "negative values", "shorter list",
         "empty list", "larger numbers", "negative numbers", "meta"),
    )  # fmt: skip
    place = draw.pick("argument", (0, 1, 2, 3, 4)) % len(arguments)
    spoilt = list(arguments)
    spoilt[place] = wrong(arguments[place], fault)
    return spoilt


def wrong(argument: Any, fault: str) -> Any:
    """The argument with a fault, or itself where the fault says nothing about its kind."""
    if isinstance(argument, list):
        if fault in ("shorter list", "empty list"):
            return argument[:-1] if fault == "shorter list" else []
        return [wrong(argument[0], fault), *argument[1:]] if argument else argument
    if isinstance(argument, int):
        return {"larger numbers": argument + 1000, "negative numbers": -argument - 1}.get(
            fault, argument
        )
    if not isinstance(argument, Tensor):
        return argument
    faults: dict[str, Callable[[Tensor], Tensor]] = {
        "rank 0": lambda t: t.new_ones(()),
        "one rank more": lambda t: t[..., None],
        "no rows": lambda t: t[:0],
        "a row less": lambda t: t[:-1],
        "a row more": lambda t: torch.cat([t, t.new_ones(1, *t.shape[1:])]),
        "wider": lambda t: torch.cat([t, t], -1),
        "int64": lambda t: t.long(),
        "int8": lambda t: t.to(torch.int8),
        "half": lambda t: t.half(),
        "double": lambda t: t.double(),
        "huge values": lambda t: t + 1_000_000 if not t.is_floating_point() else t,
        "negative values": lambda t: -t - 2 if not t.is_floating_point() else t,
        "meta": lambda t: t.to("meta"),
    }
    return faults.get(fault, lambda t: t)(argument)
