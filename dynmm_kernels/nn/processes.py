"""Branches whose weights processes hold together: all must call them, as often, in one order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import distributed, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.parallel import DistributedDataParallel

from .branch import Branch

TENSORS = "torch.distributed.tensor"  # nothing is sharded where nobody imported it

# Types of the branches that a fusion was seen to have, none of them sharded.
_seen: WeakKeyDictionary[nn.Module, tuple[type, ...]] = WeakKeyDictionary()


def may_shard() -> bool:
    """Whether several processes might hold weights together."""
    if is_dynamo_compiling() or TENSORS not in sys.modules:
        return False
    return distributed.is_initialized() and distributed.get_world_size() > 1


def refuse_sharded(fusion: nn.Module, branches: Sequence[Branch], way_out: str) -> None:
    """Raises ValueError, on every process: for calls that may leave a branch out.

    One process would wait for weights that the others never ask for, or get those of another
    branch.
    """
    types = tuple(
        kind
        for branch in branches
        for kind in (type(branch), type(branch.module), type(next(branch.parameters(), None)))
    )
    if _seen.get(fusion) == types:
        return
    for branch in branches:
        how = _how_sharded(branch)
        if how is not None:
            raise ValueError(
                f"{type(fusion).__name__}: the weights of {branch.label} are held by several "
                f"processes together ({how}), which would hang or mix them up where one process "
                f"calls it and another does not; {way_out}"
            )
    _seen[fusion] = types


def _how_sharded(branch: Branch) -> str | None:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    for part in branch.modules():
        if isinstance(part, FSDPModule):
            return "fully_shard"
        if isinstance(part, (FullyShardedDataParallel, DistributedDataParallel)):
            return type(part).__name__
    tensors = (tensor for tensor in branch.parameters() if isinstance(tensor, DTensor))
    return "DTensor" if any(True for _ in tensors) else None


RUN_ALL = "set starved='run', which calls every part in every call"
ONE_UNIT = "shard the fusion as one unit"
