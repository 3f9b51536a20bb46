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


def holds_ops() -> bool:
    """Whether a graph is traced that may hold this library's operators; none of ONNX may."""
    return torch.compiler.is_compiling() and not _exports_onnx()


def _exports_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result, which imports the compiler; Dynamo's own answer is no.
_exports_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_routed(module: nn.Module) -> None:
    """Raises ValueError: where nobody may look at values, and no graph serves every split."""
    name = type(module).__name__
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            f"{name}: routed execution is not offered under vmap, which does not tell one call's "
            "decisions from another's; call it once for all samples (rows are dimension 0), or "
            "set execution='masked' (what 'auto' does there)"
        )
    reason = "needs decisions, which tensors without data cannot tell"
    if torch.compiler.is_compiling():
        reason = "has no operators in ONNX" if _exports_onnx() else "has no graph for every split"
    raise ValueError(
        f"{name}: routed execution {reason}; set execution='masked' (what 'auto' does there)"
    )


MASKED = "set execution='masked', or use torch.export"
EXPORT = "use torch.export"
