"""Sparse batched routing for dynamic multimodal fusion: run only the branches a sample needs."""

from .functional import Lazy, RoutingPlan, Shared, combine, energy_fuse, gather, route
from .measure.costs import branch_costs
from .nn import (
    Branch,
    CascadeFusion,
    ChainedFusion,
    DepthRouting,
    EarlyExit,
    EnergyFusion,
    NestedFusion,
    QualityHistory,
    RoutedFusion,
    Routing,
    SkipLayer,
    balance_loss,
    collate_modalities,
    deep_supervision_loss,
    entropy_loss,
    quality_rank_loss,
    resource_loss,
)
from .ops import backend
from .version import __version__

__all__ = [
    "Branch",
    "CascadeFusion",
    "ChainedFusion",
    "DepthRouting",
    "EarlyExit",
    "EnergyFusion",
    "Lazy",
    "NestedFusion",
    "QualityHistory",
    "RoutedFusion",
    "Routing",
    "RoutingPlan",
    "Shared",
    "SkipLayer",
    "__version__",
    "backend",
    "balance_loss",
    "branch_costs",
    "collate_modalities",
    "combine",
    "deep_supervision_loss",
    "energy_fuse",
    "entropy_loss",
    "gather",
    "quality_rank_loss",
    "resource_loss",
    "route",
]
