"""The contract of every op: the words, the library, and the registry that `op` fills.

The ops themselves stand in `reference`: there each has its schema, its shapes without data (the
fake) and its meaning. Compiled kernels override the reference per device from libraries of their
own, so an installation without a compiler is the same library, slower.

Words: N rows (samples), k ranks (branches per sample), B branches. An *entry* is (row n, rank j),
flat n*k + j. A *slot* is a place in the order sorted by branch. `header` is int32 [B + 3]: the
B + 1 offsets of the branches' slots, at FAULTS the number of faulty entries, at FIRST the first
of them or -1; together, because one copy brings all that the host must know.

Any tensors and numbers are safe to pass: `checks` refuses what does not fit. Index tensors may
hold anything: an entry that names no row is a row of zeros to gather_rows, as a slot that no output
holds is to combine_rows, so that the two stay each other's transpose and no device is waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

NAMESPACE = "dynmm_kernels"
FAULTS, FIRST = -2, -1

Function = TypeVar("Function", bound=Callable[..., Any])


class Op(NamedTuple):
    schema: str
    reference: Callable[..., Any]
    sums: bool  # kernels may add in another order: the same up to rounding, not bit for bit


OPS: dict[str, Op] = {}

library = torch.library.Library(NAMESPACE, "DEF")


def op(
    schema: str, *, fake: Callable[..., Any], sums: bool = False
) -> Callable[[Function], Function]:
    """The decorated function becomes the reference of an op; `fake` gives shapes without data.

    An op that takes lists of integers has an overload `traced`, for which they may be symbols:
    sizes that a graph gets to know when it runs. Such lists take longer to parse.
    """
    name = sys.intern(schema.partition("(")[0])  # found as fast as a name that stands in code

    def define(reference: Function) -> Function:
        for overload, its_schema in overloads_of(schema).items():
            library.define(its_schema)
            library.impl(overload, reference, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{overload}", fake, lib=library)
            torch.library.register_vmap(f"{NAMESPACE}::{overload}", _no_vmap(name), lib=library)
        OPS[name] = Op(schema, reference, sums)
        return reference

    return define


def overloads_of(schema: str) -> dict[str, str]:
    """The schemas of an op by the names of its overloads, the traced one last."""
    name = schema.partition("(")[0]
    traced = schema.replace("int[]", "SymInt[]").replace("(", ".traced(", 1)
    return {name: schema, f"{name}.traced": traced} if "int[]" in schema else {name: schema}


def _no_vmap(name: str) -> Callable[..., Any]:
    def refuse(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise RuntimeError(
            f"vmap over {name} is not offered; call it once for all samples: rows are its "
            "dimension 0"
        )

    return refuse
