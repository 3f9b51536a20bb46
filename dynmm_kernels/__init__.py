"""Sparse batched routing for dynamic multimodal fusion: run only the branches a sample needs."""

from .functional import Lazy, RoutingPlan, Shared, combine, gather, route
from .measure.costs import branch_costs
from .nn import (
    Branch,
    ChainedFusion,
    DepthRouting,
    NestedFusion,
    QualityHistory,
    RoutedFusion,
    Routing,
    balance_loss,
    entropy_loss,
    quality_rank_loss,
    resource_loss,
)
from .ops import backend
from .version import __version__

__all__ = [
    "Branch",
    "ChainedFusion",
    "DepthRouting",
    "Lazy",
    "NestedFusion",
    "QualityHistory",
    "RoutedFusion",
    "Routing",
    "RoutingPlan",
    "Shared",
    "__version__",
    "backend",
    "balance_loss",
    "branch_costs",
    "combine",
    "entropy_loss",
    "gather",
    "quality_rank_loss",
    "resource_loss",
    "route",
]
