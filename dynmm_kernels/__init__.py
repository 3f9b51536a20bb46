"""Sparse batched routing for dynamic multimodal fusion: run only the branches a sample needs."""

from .functional import Lazy, RoutingPlan, Shared, combine, energy_fuse, gather, route
from .measure.costs import branch_costs
from .nn import (
    Branch,
    ChainedFusion,
    DepthRouting,
    EnergyFusion,
    NestedFusion,
    QualityHistory,
    RoutedFusion,
    Routing,
    collate_modalities,
    quality_rank_loss,
    resource_loss,
)
from .ops import backend
from .version import __version__

__all__ = [
    "Branch",
    "ChainedFusion",
    "DepthRouting",
    "EnergyFusion",
    "Lazy",
    "NestedFusion",
    "QualityHistory",
    "RoutedFusion",
    "Routing",
    "RoutingPlan",
    "Shared",
    "__version__",
    "backend",
    "branch_costs",
    "collate_modalities",
    "combine",
    "energy_fuse",
    "gather",
    "quality_rank_loss",
    "resource_loss",
    "route",
]
