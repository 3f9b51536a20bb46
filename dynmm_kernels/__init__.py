"""Sparse batched routing for dynamic multimodal fusion: run only the branches a sample needs."""

from .costs import branch_costs
from .functional import combine, gather, route
from .losses import resource_loss
from .nn import Branch, ChainedFusion, DepthRouting, NestedFusion, RoutedFusion, Routing
from .ops import backend
from .plan import RoutingPlan
from .tree import Lazy, Shared

__version__ = "0.1.0"

__all__ = [
    "Branch",
    "ChainedFusion",
    "DepthRouting",
    "Lazy",
    "NestedFusion",
    "RoutedFusion",
    "Routing",
    "RoutingPlan",
    "Shared",
    "backend",
    "branch_costs",
    "combine",
    "gather",
    "resource_loss",
    "route",
]
