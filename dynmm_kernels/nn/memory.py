"""Who else reads a tensor's memory, so that nothing is written there that others still need."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def unaliased(output: Any, inputs: Iterable[Tensor]) -> Any:
    """`output`, copied if it lies in an input's memory (an identity branch that got every sample).

    Otherwise writing into the result would write into the batch, on such batches only.
    """
    if isinstance(output, Tensor):
        memory = output.untyped_storage().data_ptr()
        for tensor in inputs:
            if tensor.untyped_storage().data_ptr() == memory:
                return output.clone()
    return output


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written to; nothing for those of inference mode, which do not count."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return []
