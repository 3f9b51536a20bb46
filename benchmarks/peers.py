"""Routing metadata as other libraries prepare it, where they are installed.

Each peer turns a choice int64 [N] on a GPU into what its own kernels need: at least the order of
the rows by branch and the branches' sizes. Nothing of theirs is part of this project.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor


def torch_grouped_mm(choice: Tensor, branches: int) -> Callable[[], object]:
    """What F.grouped_mm expects: rows sorted by branch and the branches' ends, int32."""

    def prepare():
        order = torch.argsort(choice, stable=True)
        ends = torch.bincount(choice, minlength=branches).cumsum(0).int()
        return order, ends

    return prepare


def scattermoe(choice: Tensor, branches: int) -> Callable[[], object]:
    """Sorted experts, the order, the offsets (scattermoe.parallel_experts.flatten_sort_count)."""
    experts = importlib.import_module("scattermoe.parallel_experts")
    chosen = choice.unsqueeze(1)
    return lambda: experts.flatten_sort_count(chosen, num_experts=branches)


def triton_kernels(choice: Tensor, branches: int) -> Callable[[], object]:
    """The bitmatrix of a top-1 gate, both permutations and the block schedule."""
    topk = importlib.import_module("triton_kernels.topk").topk
    tensor = importlib.import_module("triton_kernels.tensor")
    logits = torch.nn.functional.one_hot(choice, branches).to(torch.float16)

    def prepare():
        mask = topk(logits, 1, apply_softmax=False).mask
        sizes = mask.sum(dim=0) if hasattr(mask, "sum") else None
        metadata = tensor.make_bitmatrix_metadata(choice.unsqueeze(1).short(), mask)
        sizes = metadata.col_sum if sizes is None else sizes
        return metadata, tensor.make_ragged_tensor_metadata(sizes, choice.numel())

    return prepare


def transformer_engine(choice: Tensor, branches: int) -> Callable[[], object]:
    """moe_permute with an index map, which also moves the rows (16 bytes each here)."""
    permute = importlib.import_module("transformer_engine.pytorch").moe_permute
    rows = torch.zeros(choice.numel(), 8, dtype=torch.bfloat16, device=choice.device)
    indices = choice.int().unsqueeze(1)
    return lambda: permute(rows, indices, map_type="index")


PEERS = {
    "torch_grouped_mm": torch_grouped_mm,
    "scattermoe": scattermoe,
    "triton_kernels": triton_kernels,
    "transformer_engine": transformer_engine,
}
