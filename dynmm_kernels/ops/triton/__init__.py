"""The ops in Triton, with the signatures and results of the reference.

Imported when a Triton kernel is first called, never before. Launches name their configuration
(configs.py); nothing is tuned at run time, so the same call is the same kernel every time.
"""

from .combine_rows import combine_rows
from .gather_rows import gather_rows
from .route import route, route_argmax
from .row_dots import row_dots

__all__ = ["combine_rows", "gather_rows", "route", "route_argmax", "row_dots"]
