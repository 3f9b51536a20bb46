"""The upper floor: modules that know models, not kernels."""

from .branch import Branch
from .chained import ChainedFusion
from .fusion import RoutedFusion
from .fusions import Add, Concat, SEAdd, WeightedSum
from .nested import NestedFusion
from .routing import DepthRouting, Routing

__all__ = [
    "Add",
    "Branch",
    "ChainedFusion",
    "Concat",
    "DepthRouting",
    "NestedFusion",
    "RoutedFusion",
    "Routing",
    "SEAdd",
    "WeightedSum",
]
