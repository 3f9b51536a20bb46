"""What tracers that would keep the decisions of one batch are told."""

from __future__ import annotations

from torch import nn


def refuse_jit(module: nn.Module, way_out: str) -> None:
    """Raises ValueError: for torch.jit.trace, and the ONNX exporter that builds on it."""
    raise ValueError(
        f"{type(module).__name__}: torch.jit.trace, and torch.onnx.export(dynamo=False), would "
        f"keep the decisions of the example and be wrong for any other batch; {way_out}"
    )


def refuse_routed(module: nn.Module) -> None:
    """Raises ValueError: for modules whose routed execution has no graph for every split."""
    raise ValueError(
        f"{type(module).__name__}: routed execution is not offered while a graph is traced; set "
        "execution='masked' (what 'auto' does there), or compile its parts one by one"
    )


MASKED = "set execution='masked', or use torch.export"
EXPORT = "use torch.export"
