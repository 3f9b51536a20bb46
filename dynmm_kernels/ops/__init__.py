"""The lowest floor: schemas, their reference, and the kernels that override it."""

from . import backends, schemas
from .backends import BACKENDS, backend, compiled, compiled_cuda, kernels, serving, using, why_not
from .checks import are_known, weight_dtype

__all__ = [
    "BACKENDS",
    "are_known",
    "backend",
    "backends",
    "compiled",
    "compiled_cuda",
    "kernels",
    "schemas",
    "serving",
    "using",
    "weight_dtype",
    "why_not",
]
