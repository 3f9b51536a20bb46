"""route against the routing metadata of other libraries on a GPU; absent ones are skipped.

Each peer turns a choice int64 [N] on a GPU into what its own kernels need: at least the order of
the rows by branch and the branches' sizes. Nothing of theirs is part of this project.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contest import Contest, Outcome, Row
from benchmarks.reference import disagreement
from benchmarks.replay import replayed
from dynmm_kernels import route


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


@dataclass(frozen=True)
class Race:
    peer: str
    n: int
    branches: int

    def __str__(self) -> str:
        return f"route N={self.n} B={self.branches}"

    def info(self, outcome: Outcome, row: str) -> dict[str, Any]:
        return {"theirs_over_ours": outcome.ratio("theirs", "ours")}


@replayed
@pytest.mark.parametrize(("n", "branches"), [(1024, 4), (16384, 8), (65536, 64), (1_000_000, 256)])
@pytest.mark.parametrize("peer", PEERS)
def test_route(race, device, peer, n, branches):
    """Our plan is checked; each peer answers for its own."""
    if not device.startswith("cuda"):
        pytest.skip(f"{peer}: needs a GPU")
    choice = torch.randint(0, branches, (n,), device=device)
    try:
        theirs = PEERS[peer](choice, branches)
        theirs()
    except ImportError as absent:
        pytest.skip(f"{peer}: {absent}")

    def contest() -> Contest:
        plan = route(choice, branches)
        error = disagreement(
            [plan.order.long(), torch.tensor(plan.counts)],
            [
                torch.sort(choice, stable=True).indices,
                torch.bincount(choice, minlength=branches).cpu(),
            ],
        )
        rows = {"ours": Row(lambda: route(choice, branches)), "theirs": Row(theirs)}
        return Contest(rows, dict.fromkeys(rows, error), device=device)

    race(Race(peer, n, branches), "theirs", contest)
