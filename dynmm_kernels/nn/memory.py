"""What tensors have to do with each other: whose memory they lie in, whose graph they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling


def unaliased(output: Any, held: Iterable[Tensor]) -> Any:
    """`output`, copied if it lies in the memory of a tensor that somebody else holds."""
    return output.clone() if isinstance(output, Tensor) and shares(output, held) else output


def shares(tensor: Tensor, held: Iterable[Tensor]) -> bool:
    """Whether it lies in the memory of one of the tensors `held`; without memory it may."""
    if is_dynamo_compiling():
        return True
    try:
        memory = tensor.untyped_storage().data_ptr()
        for other in held:
            if other.untyped_storage().data_ptr() == memory:
                return True
    except RuntimeError:  # fake tensors have no memory
        return True
    return False


def sharing(held: Iterable[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those of `held` in whose memory one of the tensors still lies."""
    return [other for other in held if shares(other, tensors)]


def apart(output: Any, held: Iterable[Tensor]) -> Any:
    """What a module returned for the whole batch, in memory that nobody else reads.

    Else writing into the result would, on such batches only, write into the batch (an identity
    branch), into a table of the module (a parameter, a buffer, a view of one), or into what the
    module keeps for its backward pass.
    """
    if not isinstance(output, Tensor):
        return output
    if is_dynamo_compiling() or output.requires_grad or output._is_view() or shares(output, held):
        return output.clone()
    return output


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written to; nothing for those of inference mode, which do not count."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return []


def depends_on(output: Tensor, tensor: Tensor) -> bool:
    """Whether the graph of `output` leads to `tensor`, which requires grad."""
    if not output.requires_grad:
        return False
    wanted = torch.autograd.graph.get_gradient_edge(tensor)
    first = torch.autograd.graph.get_gradient_edge(output)
    ahead: list[tuple[Any, int]] = [(first.node, first.output_nr)]
    seen = set()
    for node, number in ahead:  # grows
        if node is wanted.node and number == wanted.output_nr:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            ahead += node.next_functions
    return False
