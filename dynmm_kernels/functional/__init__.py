"""The middle floor: plans, and what moves by them. Checked once, differentiable to any order."""

from .energy import EnergyFused, energy_fuse
from .maps import se_add
from .movement import combine, gather
from .plan import RoutingPlan
from .sorting import route
from .tree import Lazy, Shared

__all__ = [
    "EnergyFused",
    "Lazy",
    "RoutingPlan",
    "Shared",
    "combine",
    "energy_fuse",
    "gather",
    "route",
    "se_add",
]
