"""The upper floor: modules that know models, not kernels."""

from .branch import Branch
from .fusion import RoutedFusion
from .routing import Routing

__all__ = ["Branch", "RoutedFusion", "Routing"]
