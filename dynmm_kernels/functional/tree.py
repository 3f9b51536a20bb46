"""Nested inputs and outputs as flat lists of leaves, and back.

Tensors, lists, tuples, named tuples, dicts, None and whatever else torch's pytree registry knows
are walked; anything else is a leaf. The common cases (one tensor, a flat list or tuple of tensors)
take a short way, because this runs on every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
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
            the device where the branch computes. It may return its own store to a branch that does
            not write there; one that begins with a layer in place gets a copy.
    """

    __slots__ = ("fetch",)

    def __init__(self, fetch: Callable[[Tensor], Tensor]) -> None:
        self.fetch = fetch


Spec = Any  # None: a single leaf; (list or tuple,): a flat one of tensors; else torch's TreeSpec
_LIST, _TUPLE = (list,), (tuple,)


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    kind = type(tree)
    if kind is Tensor or isinstance(tree, Tensor):
        return [tree], None
    if kind is tuple or kind is list:
        for leaf in tree:
            if not isinstance(leaf, Tensor):
                break
        else:
            return list(tree), _TUPLE if kind is tuple else _LIST
    return pytree.tree_flatten(tree, is_leaf=_is_packed)


def _is_packed(node: Any) -> bool:
    """A PackedSequence is a named tuple, but not one of per-sample tensors."""
    return isinstance(node, PackedSequence)


def unflatten(leaves: list[Any], spec: Spec) -> Any:
    if spec is None:
        return leaves[0]
    if is_flat(spec):
        return spec[0](leaves)
    return pytree.tree_unflatten(leaves, spec)


def is_flat(spec: Spec) -> bool:
    """True for a list or tuple of tensors."""
    return spec is _TUPLE or spec is _LIST


def flatten_as(spec: Spec, tree: Any) -> list[Any] | None:
    """The leaves of `tree` in the order of `spec`; None where it has another structure.

    Dicts of the same keys are the same structure, whatever the order of their keys.
    """
    leaves, own = flatten(tree)
    if own == spec:
        return leaves
    if not (isinstance(spec, pytree.TreeSpec) and isinstance(own, pytree.TreeSpec)):
        return None
    try:
        ordered = spec.flatten_up_to(tree)
    except ValueError:
        return None
    key = identity()
    return ordered if {*map(key, ordered)} == {*map(key, leaves)} else None


def identity() -> Callable[[Any], Any]:
    """Gives keys for objects; in a traced graph not their addresses, which change by the call."""
    return _itself if is_dynamo_compiling() else id


def _itself(leaf: Any) -> Any:
    return leaf if isinstance(leaf, Tensor) else id(leaf)


def tensors_in(leaves: list[Any]) -> list[Tensor]:
    """Every tensor among the leaves, those in `Shared` too."""
    plain = [leaf.tensor if isinstance(leaf, Shared) else leaf for leaf in leaves]
    return [leaf for leaf in plain if isinstance(leaf, Tensor)]


def zeros_like(like: Any, num_rows: int, device: torch.device) -> Any:
    """`like` with zeros [num_rows, ...] for its tensors: what `combine` makes of nobody's rows."""
    if like is None:
        raise ValueError(
            "combine: every output is None, so the shape of the result is unknown; give like=, a "
            "tensor with such rows"
        )
    leaves, spec = flatten(like)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0:
                raise ValueError(
                    "combine: like must hold tensors with rows; got one of 0 dimensions"
                )
            shape = num_rows, *leaf.shape[1:]
            leaves[i] = torch.zeros(shape, dtype=leaf.dtype, device=device)
    return unflatten(leaves, spec)


def is_scalar(leaf: Any) -> bool:
    """Whether it is a floating tensor without dimensions: an auxiliary loss, among outputs."""
    return isinstance(leaf, Tensor) and leaf.ndim == 0 and leaf.is_floating_point()


def holds_scalar(tree: Any) -> bool:
    return any(map(is_scalar, flatten(tree)[0]))


def find_rows(
    leaves: list[Any], where: str, num_rows: int | None = None
) -> tuple[list[int], int | None, torch.device | None]:
    """Positions of the per-sample leaves, the number of samples N they agree on, their device.

    Args:
        num_rows: N where it is known already.

    Raises:
        ValueError: two tensors disagree on N or on the device. TypeError: a leaf that cannot be
            split by row.
    """
    rows = []
    device = None
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0:
                continue
            size = leaf.shape[0]
            if device is None:
                device = leaf.device
            if size != num_rows:
                if num_rows is not None:
                    raise ValueError(
                        f"{where}: every tensor must have the same number of samples in dim 0; "
                        f"tensor {position} has shape {list(leaf.shape)}, expected {num_rows} "
                        "samples. Wrap what belongs to the whole batch in Shared(tensor)"
                    )
                num_rows = size
            if leaf.layout is not torch.strided:
                raise TypeError(f"{where}: only strided tensors can be routed; got {leaf.layout}")
            if leaf.device != device:
                raise ValueError(
                    f"{where}: all tensors must be on one device; tensor {position} is on "
                    f"{leaf.device}, the first on {device}"
                )
            rows.append(position)
        elif isinstance(leaf, Lazy):
            rows.append(position)
        elif leaf is not None and not isinstance(leaf, (Shared, int, float, str)):
            _check_leaf(leaf, where)
    return rows, num_rows, device


def _check_leaf(leaf: Any, where: str) -> None:
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
