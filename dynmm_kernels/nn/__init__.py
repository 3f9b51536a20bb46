"""The upper floor: modules that know models, not kernels."""

from .branch import Branch
from .capture import Capture, CaptureReport
from .cascade.calibration import Calibration
from .cascade.fusion import CascadeFusion
from .cascade.routing import CascadeRouting, deep_supervision_loss
from .collate import Collated, collate_modalities
from .energy import EnergyFusion, EnergyOutput
from .gates import ConfidenceGate, exponential_temperature
from .keys import keep_keys
from .layers.exit import EarlyExit
from .layers.skip import SkipLayer
from .losses import balance_loss, entropy_loss, resource_loss
from .quality import QualityHistory, quality_rank_loss
from .replays import CudaGraphReplay, EagerReplay, Replay
from .routed.fusion import RoutedFusion
from .routing import DepthRouting, Routing
from .stacks.chained import ChainedFusion
from .stacks.joins import Add, Concat, SEAdd, WeightedSum
from .stacks.nested import NestedFusion
from .usage import Usage

__all__ = [
    "Add",
    "Branch",
    "Calibration",
    "Capture",
    "CaptureReport",
    "CascadeFusion",
    "CascadeRouting",
    "ChainedFusion",
    "Collated",
    "Concat",
    "ConfidenceGate",
    "CudaGraphReplay",
    "DepthRouting",
    "EagerReplay",
    "EarlyExit",
    "EnergyFusion",
    "EnergyOutput",
    "NestedFusion",
    "QualityHistory",
    "Replay",
    "RoutedFusion",
    "Routing",
    "SEAdd",
    "SkipLayer",
    "Usage",
    "WeightedSum",
    "balance_loss",
    "collate_modalities",
    "deep_supervision_loss",
    "entropy_loss",
    "exponential_temperature",
    "keep_keys",
    "quality_rank_loss",
    "resource_loss",
]
