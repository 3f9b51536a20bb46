"""The ops as Triton kernels: the same results as the reference, for any GPU that Triton serves.

Importing this package imports triton, so that only the first call of a Triton op does. Kernels loop
with `while`: Triton 3.6 cannot interpret a `range` over arguments with NumPy 2.4.
"""

from .combine_rows import combine_rows
from .gather_rows import gather_rows
from .route import route, route_argmax
from .row_dots import row_dots
from .se_add import se_add, se_add_grads
from .se_add_sums import se_add_dots, se_add_means

__all__ = [
    "combine_rows",
    "gather_rows",
    "route",
    "route_argmax",
    "row_dots",
    "se_add",
    "se_add_dots",
    "se_add_grads",
    "se_add_means",
]
