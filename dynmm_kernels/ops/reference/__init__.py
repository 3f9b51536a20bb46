"""The reference: what every op means, in eager PyTorch, on any device. Kernels must agree with it.

Movement is bit for bit; arithmetic accumulates fp16, bf16 and fp32 in fp32, fp64 in fp64, rank by
rank in ascending order. What an op cannot take is refused by `checks`.
"""

from ..schemas import OPS

from . import sorting, movement, maps, energy  # isort: skip  # noqa: F401  (the order of OPS)
from .layouts import empty_maps, empty_rows

__all__ = ["empty_maps", "empty_rows", *OPS]

globals().update({name: op.reference for name, op in OPS.items()})
