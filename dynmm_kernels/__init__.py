"""Sparse batched routing for dynamic multimodal fusion: run only the branches a sample needs."""

from .costs import branch_costs
from .functional import combine, gather, route
from .losses import resource_loss
from .nn import Branch, ChainedFusion, DepthRouting, NestedFusion, RoutedFusion, Routing
from .ops import backend
from .plan import RoutingPlan
from .tree import Lazy, Shared
from .version import __version__

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
    "__version__",
    "backend",
    "branch_costs",
    "combine",
    "gather",
    "resource_loss",
    "route",
]
