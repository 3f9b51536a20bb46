"""The upper floor: modules that know models, not kernels."""

from .branch import Branch
from .chained import ChainedFusion
from .fusion import RoutedFusion
from .fusions import Add, Concat, SEAdd, WeightedSum
from .gates import ConfidenceGate, exponential_temperature
from .nested import NestedFusion
from .routing import DepthRouting, Routing
from .usage import Usage

__all__ = [
    "Add",
    "Branch",
    "ChainedFusion",
    "Concat",
    "ConfidenceGate",
    "DepthRouting",
    "NestedFusion",
    "RoutedFusion",
    "Routing",
    "SEAdd",
    "Usage",
    "WeightedSum",
    "exponential_temperature",
]
