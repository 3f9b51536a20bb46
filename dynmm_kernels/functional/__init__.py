"""The middle floor: plans, and what moves by them. Checked once, differentiable to any order."""

from .maps import se_add
from .movement import combine, gather
from .plan import RoutingPlan
from .sorting import route
from .tree import Lazy, Shared

__all__ = ["Lazy", "RoutingPlan", "Shared", "combine", "gather", "route", "se_add"]
