"""python -m dynmm_kernels check: every backend against the reference, on this machine.

A few seconds. Values that are moved must be the same, bit for bit; sums within rounding. Ends with
code 1 where one is not.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .options import add_json

EXAMPLES = """\
examples:
  python -m dynmm_kernels check
  python -m dynmm_kernels check --json
  TRITON_INTERPRET=1 python -m dynmm_kernels check
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints a line per backend and op; 0 if all agree with the reference."""
    found: dict[str, Any] = {}
    failed = False
    say = (lambda *words: None) if arguments.json else print
    for name in ops.BACKENDS:
        reason = ops.why_not(name)
        if name == "reference":
            continue
        if reason:
            found[name] = f"not available: {reason}"
            say(f"{name:<10} {found[name]}")
            continue
        dtypes = [torch.float32, torch.float64, torch.bfloat16]
        if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            say(f"{name:<10} interpreted, without bf16, which the interpreter rounds otherwise")
            dtypes.remove(torch.bfloat16)
        found[name] = {}
        for op in ops.schemas.OPS:
            cases = [arguments for of, arguments in _cases(dtypes) if of == op]
            bad = [text for text in (_compare(name, op, case) for case in cases) if text]
            bad += [] if cases else ["nothing to compare"]
            failed = failed or bool(bad)
            found[name][op] = {"cases": len(cases), "differences": bad}
            say(f"{name:<10} {op:<17} {len(cases)} cases  {'; '.join(bad) or 'ok'}")
    say("check failed" if failed else "check passed")
    if arguments.json:
        print(json.dumps({"passed": not failed, "backends": found}, indent=2))
    return 1 if failed else 0


def _compare(name: str, op: str, arguments: tuple[Any, ...]) -> str | None:
    """What differs, or None."""
    with ops.backend("reference"):
        wanted = _as_tuple(getattr(ops.kernels(), op)(*arguments))
    device = "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    arguments = tuple(_on(device, argument) for argument in arguments)
    with ops.backend(name):
        got = tuple(result.cpu() for result in _as_tuple(getattr(ops.kernels(), op)(*arguments)))
    try:
        # Default tolerances for sums, whose order of rounding differs; none for moved values.
        tolerance = None if ops.schemas.OPS[op].sums else 0.0
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
        utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            getattr(torch.ops.dynmm_kernels, op).default, arguments, test_utils=utils
        )
    except Exception as error:  # reported, with the first line of what went wrong
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _on(device: str, argument: Any) -> Any:
    if isinstance(argument, list):
        return [_on(device, element) for element in argument]
    return argument.to(device) if isinstance(argument, Tensor) else argument


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    return tuple(tensor for part in result for tensor in _as_tuple(part))


def _cases(dtypes: list[torch.dtype]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(op, arguments): empty, single and odd batches, several dtypes."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    for rows, branches in ((0, 2), (1, 1), (33, 3), (1025, 5)):
        choice = torch.randint(-1, branches, (rows, 2), generator=generator)
        yield "route", (choice, branches)
        yield "route", (randn(rows, branches) > 0, branches)
        yield "route_argmax", (randn(rows, branches),)
        order, inverse, header = ops.kernels().route(choice, branches)
        starts = header.tolist()[: branches + 1]
        for dtype in dtypes:
            source, weights = (
                randn(rows, 7, dtype=dtype),
                randn(rows, 2).to(ops.weight_dtype(dtype)),
            )
            sources = [source, randn(rows, 3, 2, dtype=dtype)]
            begin, end = [starts[0]] * 2, [starts[-1]] * 2
            yield "gather_rows", (sources, begin, end, order, 2, None)
            yield "gather_rows", (sources, begin, end, order, 2, weights)
            outputs = [randn(stop - start, 7, dtype=dtype) for start, stop in pairwise(starts)]
            yield "combine_rows", (outputs, starts[:-1], inverse, None)
            yield "combine_rows", (outputs, starts[:-1], inverse, weights)
            yield "row_dots", (source, outputs, starts[:-1], inverse)
    for shape in ((0, 3, 2, 2), (1, 1, 5, 5), (3, 33, 4, 7)):
        for dtype in dtypes:
            maps, grad = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
            active = shape[0] - shape[0] // 3
            factors = [randn(active, shape[1]).to(ops.weight_dtype(dtype)) for _ in range(4)]
            for memory_format in (torch.contiguous_format, torch.channels_last):
                main = maps.contiguous(memory_format=memory_format)
                yield "se_add", (main, grad[:active], *factors[:2])
                yield "se_add_means", (main,)
                yield "se_add_dots", (grad, main, main[:active])
                yield "se_add_grads", (main, *factors)
    for rows, classes in ((0, 3), (1, 2), (33, 101)):
        for dtype in dtypes:
            wide = ops.weight_dtype(dtype)
            logits = [randn(rows, classes, dtype=dtype) for _ in range(3)]
            present = randn(rows, 3) > -0.5
            labels = torch.randint(classes, (rows,), generator=generator)
            for targets in (labels, randn(rows, classes).sigmoid().to(wide)):
                fused = (logits, targets, present, None, 0, 0.1)
                yield "energy_fuse", fused
                energies = ops.kernels().energy_fuse(*fused)[3]
                grads = (logits[0], randn(rows, 3).to(wide), randn(rows, 4).to(wide))
                yield "energy_fuse_grads", (*fused, False, energies, *grads)
