"""The upper floor: modules that know models, not kernels."""

from .branch import Branch
from .chained import ChainedFusion
from .fusion import RoutedFusion
from .nested import NestedFusion
from .routing import DepthRouting, Routing

__all__ = ["Branch", "ChainedFusion", "DepthRouting", "NestedFusion", "RoutedFusion", "Routing"]
