"""The upper floor: modules that know models, not kernels."""

from .branch import Branch
from .collate import Collated, collate_modalities
from .energy import EnergyFusion, EnergyOutput
from .gates import ConfidenceGate, exponential_temperature
from .losses import resource_loss
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
    "Collated",
    "Concat",
    "ConfidenceGate",
    "DepthRouting",
    "EnergyFusion",
    "EnergyOutput",
    "NestedFusion",
    "QualityHistory",
    "RoutedFusion",
    "Routing",
    "SEAdd",
    "Usage",
    "WeightedSum",
    "collate_modalities",
    "exponential_temperature",
    "quality_rank_loss",
    "resource_loss",
]
