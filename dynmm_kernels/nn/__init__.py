"""The upper floor: modules that know models, not kernels."""

from .branch import Branch
from .gates import ConfidenceGate, exponential_temperature
from .losses import balance_loss, entropy_loss, resource_loss
from .quality import QualityHistory, quality_rank_loss
from .routed.fusion import RoutedFusion
from .routing import DepthRouting, Routing
from .stacks.chained import ChainedFusion
from .stacks.joins import Add, Concat, SEAdd, WeightedSum
from .stacks.nested import NestedFusion
from .usage import Usage

__all__ = [
    "Add",
    "Branch",
    "ChainedFusion",
    "Concat",
    "ConfidenceGate",
    "DepthRouting",
    "NestedFusion",
    "QualityHistory",
    "RoutedFusion",
    "Routing",
    "SEAdd",
    "Usage",
    "WeightedSum",
    "balance_loss",
    "entropy_loss",
    "exponential_temperature",
    "quality_rank_loss",
    "resource_loss",
]
