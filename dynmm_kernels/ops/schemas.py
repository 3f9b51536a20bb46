"""The contract of every op: its schema, its shapes without data, and the reference behind it.

Compiled kernels override the reference per device from libraries of their own, so an installation
without a compiler is the same library, slower.

Words: N rows (samples), k ranks (branches per sample), B branches. An *entry* is (row n, rank j),
flat n*k + j. A *slot* is a place in the order sorted by branch. `header` is int32 [B + 3]: the
B + 1 offsets of the branches' slots, the number of faulty entries, the first faulty entry or -1;
together, because one copy brings all that the host must know.

Any tensors and numbers are safe to pass: `checks` refuses what does not fit. Index tensors may
hold anything: an entry that names no row is a row of zeros to gather_rows, as a slot that no output
holds is to combine_rows, so that the two stay each other's transpose and no device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .checks import weight_dtype

NAMESPACE = "dynmm_kernels"
OPS = (
    *("route", "route_argmax", "gather_rows", "combine_rows", "row_dots"),
    *("se_add", "se_add_means", "se_add_dots", "se_add_grads"),
)

library = torch.library.Library(NAMESPACE, "DEF")
library.define("route(Tensor selection, int num_branches) -> (Tensor, Tensor, Tensor)")
library.define("route_argmax(Tensor logits) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(
    "gather_rows(Tensor[] sources, int[] starts, int[] stops, Tensor order, int ranks,"
    " Tensor? weights=None) -> Tensor[]"
)
library.define(
    "combine_rows(Tensor[] outputs, int[] starts, Tensor inverse, Tensor? weights=None) -> Tensor"
)
library.define("row_dots(Tensor rows, Tensor[] outputs, int[] starts, Tensor inverse) -> Tensor")
library.define("se_add(Tensor main, Tensor aux, Tensor main_scale, Tensor aux_scale) -> Tensor")
library.define("se_add_means(Tensor maps) -> Tensor")
library.define("se_add_dots(Tensor grad, Tensor main, Tensor aux) -> (Tensor, Tensor)")
library.define(
    "se_add_grads(Tensor grad, Tensor main_scale, Tensor aux_scale, Tensor main_shift,"
    " Tensor aux_shift) -> (Tensor, Tensor)"
)


def _no_vmap(op: str) -> Callable[..., Any]:
    def refuse(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise RuntimeError(
            f"vmap over {op} is not offered; call it once for all samples: rows are its dimension 0"
        )

    return refuse


for _op in OPS:
    library.impl(_op, getattr(reference, _op), "CompositeExplicitAutograd")
    torch.library.register_vmap(f"{NAMESPACE}::{_op}", _no_vmap(_op), lib=library)


@torch.library.register_fake(f"{NAMESPACE}::route", lib=library)
def _(selection: Tensor, num_branches: int) -> tuple[Tensor, Tensor, Tensor]:
    checks.route(selection, num_branches)
    num_rows, ranks = selection.shape if selection.ndim == 2 else (selection.shape[0], 1)
    return _plan_like(selection, num_rows, ranks, num_branches)


@torch.library.register_fake(f"{NAMESPACE}::route_argmax", lib=library)
def _(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.route_argmax(logits)
    num_rows, num_branches = logits.shape
    choice = logits.new_empty(num_rows, dtype=torch.int64)
    return choice, *_plan_like(logits, num_rows, 1, num_branches)


@torch.library.register_fake(f"{NAMESPACE}::gather_rows", lib=library)
def _(
    sources: list[Tensor],
    starts: list[int],
    stops: list[int],
    order: Tensor,
    ranks: int,
    weights: Tensor | None = None,
) -> list[Tensor]:
    checks.gather_rows(sources, starts, stops, order, ranks, weights)
    return [
        reference.empty_rows(source, stop - start)
        for source, start, stop in zip(sources, starts, stops, strict=True)
    ]


@torch.library.register_fake(f"{NAMESPACE}::combine_rows", lib=library)
def _(
    outputs: list[Tensor], starts: list[int], inverse: Tensor, weights: Tensor | None = None
) -> Tensor:
    checks.combine_rows(outputs, starts, inverse, weights)
    return reference.empty_rows(outputs[0], inverse.shape[0])


@torch.library.register_fake(f"{NAMESPACE}::row_dots", lib=library)
def _(rows: Tensor, outputs: list[Tensor], starts: list[int], inverse: Tensor) -> Tensor:
    checks.row_dots(rows, outputs, starts, inverse)
    return rows.new_empty(inverse.shape, dtype=weight_dtype(rows.dtype))


@torch.library.register_fake(f"{NAMESPACE}::se_add", lib=library)
def _(main: Tensor, aux: Tensor, main_scale: Tensor, aux_scale: Tensor) -> Tensor:
    checks.se_add(main, aux, main_scale, aux_scale)
    return reference.empty_maps(main, main.shape[0])


@torch.library.register_fake(f"{NAMESPACE}::se_add_means", lib=library)
def _(maps: Tensor) -> Tensor:
    checks.se_add_means(maps)
    return maps.new_empty(maps.shape[:2], dtype=weight_dtype(maps.dtype))


@torch.library.register_fake(f"{NAMESPACE}::se_add_dots", lib=library)
def _(grad: Tensor, main: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    checks.se_add_dots(grad, main, aux)
    shape, dtype = aux.shape[:2], weight_dtype(grad.dtype)
    return grad.new_empty(shape, dtype=dtype), grad.new_empty(shape, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::se_add_grads", lib=library)
def _(
    grad: Tensor, main_scale: Tensor, aux_scale: Tensor, main_shift: Tensor, aux_shift: Tensor
) -> tuple[Tensor, Tensor]:
    checks.se_add_grads(grad, main_scale, aux_scale, main_shift, aux_shift)
    active = aux_scale.shape[0]
    return reference.empty_maps(grad, grad.shape[0]), reference.empty_maps(grad, active)


def _plan_like(
    like: Tensor, num_rows: int, ranks: int, num_branches: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty(num_rows * ranks, dtype=torch.int32),
        like.new_empty((num_rows, ranks), dtype=torch.int32),
        like.new_empty(num_branches + 3, dtype=torch.int32),
    )
