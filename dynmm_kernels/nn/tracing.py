"""What tracers that would keep the decisions of one batch are told."""

from __future__ import annotations

import torch
from torch import nn


def refuse_jit(module: nn.Module, way_out: str) -> None:
    """Raises ValueError: for torch.jit.trace, and the ONNX exporter that builds on it."""
    raise ValueError(
        f"{type(module).__name__}: torch.jit.trace, and torch.onnx.export(dynamo=False), would "
        f"keep the decisions of the example and be wrong for any other batch; {way_out}"
    )


def refuse_routed(module: nn.Module) -> None:
    """Raises ValueError: for modules whose routed execution has no graph for every split."""
    name = type(module).__name__
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            f"{name}: routed execution is not offered under vmap, which does not tell one call's "
            "decisions from another's; call it once for all samples (rows are dimension 0), or "
            "set execution='masked' (what 'auto' does there)"
        )
    raise ValueError(
        f"{name}: routed execution is not offered while a graph is traced; set "
        "execution='masked' (what 'auto' does there), or compile its parts one by one"
    )


MASKED = "set execution='masked', or use torch.export"
EXPORT = "use torch.export"
