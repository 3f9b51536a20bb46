"""QMF's fusion of logits, with losses and gradients, against the same written in PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import Contest, Outcome, Row
from benchmarks.reference import TOLERANCE, disagreement
from dynmm_kernels import energy_fuse

STEPS = ("forward", "losses", "training")
ROWS = ("dynmm_kernels", "torch", "torch_compiled", "clone")
OURS = ROWS[:1]

Fuse = Callable[[list[Tensor], Tensor | None], list[Tensor]]


def late_fusion(logits: Sequence[Tensor], targets: Tensor | None = None) -> list[Tensor]:
    """Fused logits [N, C], confidences [N, M] and, given targets [N], losses [N, M + 1]."""
    confidence = torch.stack([0.1 * x.logsumexp(1) for x in logits], 1)
    fused = sum(confidence[:, m, None] * x for m, x in enumerate(logits))
    if targets is None:
        return [fused, confidence]
    losses = [F.cross_entropy(x, targets, reduction="none") for x in (*logits, fused)]
    return [fused, confidence, torch.stack(losses, 1)]


def ours(logits: list[Tensor], targets: Tensor | None) -> list[Tensor]:
    return [result for result in energy_fuse(logits, targets) if result is not None]


@dataclass(frozen=True)
class EnergySetting:
    n: int
    classes: int
    step: str
    """"forward"; "losses": with targets; "training": with targets and the backward."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    """Add the PyTorch expression under torch.compile."""
    modalities: int = 2

    def __str__(self) -> str:
        return f"energy_fuse {self.step} M={self.modalities} N={self.n} C={self.classes}"

    def gains(self, outcome: Outcome, row: str) -> dict[str, float | None]:
        """How many times longer others take; cloning the logits is the floor."""
        return {
            "ours_us": 1e6 * outcome.median(row),
            "torch_over_ours": outcome.ratio("torch", row),
            "compiled_over_ours": outcome.ratio("torch_compiled", row),
            "ours_over_clone": outcome.ratio(row, "clone"),
        }

    def info(self, outcome: Outcome, row: str) -> dict[str, Any]:
        """What goes beside the times of one row."""
        info = {"row": row, "error": outcome.errors[row], "threads": torch.get_num_threads()}
        return {**info, **self.gains(outcome, row)} if row in OURS else info

    def call(self, fuse: Fuse, logits: list[Tensor], targets: Tensor) -> Callable[[], list[Tensor]]:
        """One step; the last results of a training step are the gradients of the mean losses."""

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return fuse(logits, None if self.step == "forward" else targets)

        def training() -> list[Tensor]:
            results = fuse(leaves, targets)
            return [*results, *torch.autograd.grad(results[-1].mean(0).sum(), leaves)]

        leaves = [x.detach().requires_grad_() for x in logits]
        return training if self.step == "training" else forward


def contest(setting: EnergySetting) -> Contest:
    """The PyTorch expression is what others are checked against."""
    generator = torch.Generator().manual_seed(0)
    shape = (setting.n, setting.classes)
    logits = [
        torch.randn(shape, generator=generator).to(setting.device, setting.dtype)
        for _ in range(setting.modalities)
    ]
    targets = torch.randint(setting.classes, (setting.n,), generator=generator)
    fuses: dict[str, Fuse] = {"dynmm_kernels": ours, "torch": late_fusion}
    if setting.compiled:
        fuses["torch_compiled"] = torch.compile(late_fusion, dynamic=True)
    calls = {
        name: setting.call(fuse, logits, targets.to(setting.device)) for name, fuse in fuses.items()
    }
    results = {name: [x.detach().double() for x in call()] for name, call in calls.items()}
    errors = {name: disagreement(own, results["torch"]) for name, own in results.items()}
    calls["clone"], errors["clone"] = lambda: [x.clone() for x in logits], 0.0
    rows = {name: Row(call) for name, call in calls.items()}
    return Contest(rows, errors, TOLERANCE[setting.dtype], setting.device)
