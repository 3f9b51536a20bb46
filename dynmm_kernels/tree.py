"""Nested inputs and outputs as flat lists of leaves, and back.

Tensors, lists, tuples, named tuples, dicts, None and whatever else torch's pytree registry knows
are walked; anything else is a leaf. The common cases (one tensor, a flat list or tuple of tensors)
take a short way, because this runs on every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any

import numpy
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


class Shared:
    """Marks a tensor that belongs to the whole batch (a mask, a table): it is never gathered.

    Branches and the gate receive `tensor` itself.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Lazy:
    """A modality that is fetched (read, decoded, uploaded) only for the rows that need it.

    Args:
        fetch: called with the sample indices, int64 [n] on the CPU; returns a tensor [n, ...] on
            the device where the branch computes.
    """

    __slots__ = ("fetch",)

    def __init__(self, fetch: Callable[[Tensor], Tensor]) -> None:
        self.fetch = fetch


Spec = Any  # None: a single leaf; list or tuple: a flat one of tensors; else torch's TreeSpec


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    if isinstance(tree, Tensor):
        return [tree], None
    if type(tree) in (list, tuple) and all(isinstance(leaf, Tensor) for leaf in tree):
        return list(tree), (type(tree), len(tree))
    return pytree.tree_flatten(tree)


def unflatten(leaves: Iterable[Any], spec: Spec) -> Any:
    if spec is None:
        return next(iter(leaves))
    if type(spec) is tuple:
        return spec[0](leaves)
    return pytree.tree_unflatten(leaves, spec)


def is_rows(leaf: Any) -> bool:
    """True for a leaf that holds one entry per sample."""
    return isinstance(leaf, Lazy) or (isinstance(leaf, Tensor) and leaf.ndim > 0)


def check_leaf(leaf: Any, where: str) -> None:
    """Refuses containers that would pass through as a whole although they may hold samples."""
    if isinstance(leaf, PackedSequence):
        raise TypeError(
            f"{where}: a PackedSequence interleaves the samples and cannot be split by row; "
            "pass the padded tensor and its lengths, and pack inside the branch"
        )
    if isinstance(leaf, numpy.ndarray):
        raise TypeError(f"{where}: got a numpy array; pass torch.from_numpy(array)")
    if hasattr(leaf, "keys") or (is_dataclass(leaf) and not isinstance(leaf, type)):
        raise TypeError(
            f"{where}: got a {type(leaf).__name__}, which torch's pytree registry does not know; "
            "pass a dict or a tuple, or register it with torch.utils._pytree.register_pytree_node"
        )


def batch_size(leaves: Iterable[Any], where: str) -> int | None:
    """N, the common length of dim 0 of all per-sample tensors; None where there is none.

    Raises:
        ValueError: two tensors disagree. TypeError: a leaf that cannot be split by row.
    """
    size = None
    device = None
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0:
                continue
            if size is None:
                size, device = leaf.shape[0], leaf.device
            elif leaf.shape[0] != size:
                raise ValueError(
                    f"{where}: every tensor must have the same number of samples in dim 0; tensor "
                    f"{position} has shape {tuple(leaf.shape)}, the first has {size} samples. "
                    "Wrap tensors that belong to the whole batch in Shared(tensor)"
                )
            elif leaf.device != device:
                raise ValueError(
                    f"{where}: all tensors must be on one device; tensor {position} is on "
                    f"{leaf.device}, the first is on {device}"
                )
        elif leaf is not None and not isinstance(leaf, (Shared, Lazy, int, float, str)):
            check_leaf(leaf, f"{where}: leaf {position}")
    return size
