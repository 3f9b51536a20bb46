"""Cascades over QMF's pairs of encoders: the second only for samples that the first is unsure of.

QMF itself always runs both. Who leaves is planned, so that a batch of N samples lets exactly
``round(p * N)`` of them go after the first encoder and no score enters a timing by its decisions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ceilings import ceiling
from benchmarks.contest import Contest, Outcome, Row
from benchmarks.energy import late_fusion
from benchmarks.qmf import PAIRS, cascade_costs
from benchmarks.reference import TOLERANCE, relative_error
from benchmarks.workloads import planned_choice
from dynmm_kernels import Branch, CascadeFusion
from dynmm_kernels.nn.cascade.scores import probability

ROWS = ("full", "cascade", "forced", "bare")
OURS = ("cascade", "forced")  # by scores, by exits that are given


@dataclass(frozen=True)
class CascadeSetting:
    pair: str
    n: int
    p: float
    """Share of the samples that leave after the first encoder."""
    shortened: bool
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        short = " (shortened)" if self.shortened else ""
        return f"cascade {self.pair}{short} N={self.n}, {self.p:.0%} leave early"

    @property
    def counts(self) -> tuple[int, int]:
        early = round(self.p * self.n)
        return early, self.n - early

    @property
    def ceiling(self) -> float:
        return ceiling(cascade_costs(self.pair, self.shortened), self.counts)

    def gains(self, outcome: Outcome, row: str) -> dict[str, float | None]:
        """What one of the cascades wins over running both encoders, and what it costs."""
        return {
            "cascade_ms": 1e3 * outcome.median(row),
            "full_ms": 1e3 * outcome.median("full"),
            **outcome.gains(row, over="full"),
        }

    def info(self, outcome: Outcome, row: str) -> dict[str, Any]:
        """What goes beside the times of one row."""
        info = {"row": row, "counts": self.counts, "error": outcome.errors[row]}
        info["threads"] = torch.get_num_threads()
        return {**info, **self.gains(outcome, row)} if row in OURS else info


class PlannedScore(nn.Module):
    """Computes a real score, whose cost is paid, and answers with planned ones."""

    planned: Tensor

    def __init__(self, planned: Tensor):
        super().__init__()
        self.register_buffer("planned", planned)

    def forward(self, logits: Tensor) -> Tensor:
        return self.planned + 0 * probability(logits)


class CascadeProblem:
    """The encoders, inputs and planned exits of one setting; every row shares the weights."""

    def __init__(self, setting: CascadeSetting):
        self.pair = PAIRS[setting.pair]
        self.encoders = {
            name: encoder.to(setting.device, setting.dtype)
            for name, encoder in self.pair.make_encoders(setting.shortened).items()
        }
        inputs = self.pair.make_inputs(setting.n, setting.shortened)
        self.inputs = {
            name: x.to(setting.device, setting.dtype if x.is_floating_point() else None)
            for name, x in inputs.items()
        }
        leaves = planned_choice(setting.n, setting.p).to(setting.device)
        self.exits = 1 - leaves
        score = PlannedScore(leaves.to(setting.dtype))
        self.cascade = CascadeFusion(
            self.branches(), score=score, threshold=0.5, execution="routed"
        ).eval()
        self.setting = setting

    def branches(self) -> dict[str, Branch]:
        return {
            name: Branch(encoder, inputs=list(self.pair.parts[name]))
            for name, encoder in self.encoders.items()
        }

    def logits(self) -> list[Tensor]:
        """Of both encoders, on all samples."""
        return [
            encoder(*self.pair.reads(name, self.inputs)) for name, encoder in self.encoders.items()
        ]

    def full(self) -> Tensor:
        """What QMF's own code does."""
        return late_fusion(self.logits())[0]

    def bare(self) -> Callable[[], list[Tensor]]:
        """Encoders, score and fusion on rows prepared beforehand, nothing put together.

        Returns the fused logits of those who leave early and of those who stay, if there are any.
        """
        early, late = ((self.exits == s).nonzero().squeeze(1) for s in range(2))
        (name, first), (other, second) = self.encoders.items()
        own = self.pair.reads(name, self.inputs)
        rest = [x.index_select(0, late) for x in self.pair.reads(other, self.inputs)]

        def run() -> list[Tensor]:
            logits = first(*own)
            fused = late_fusion([logits])[0]
            probability(fused)
            outputs = [fused.index_select(0, early)] * bool(len(early))
            if len(late):
                outputs.append(late_fusion([logits.index_select(0, late), second(*rest)])[0])
            return outputs

        return run

    def rows(self) -> dict[str, Row]:
        limit = self.setting.ceiling
        cascade, exits = self.cascade, self.exits
        return {
            "full": Row(self.full),
            "cascade": Row(lambda: cascade(self.inputs), "bare", limit),
            "forced": Row(lambda: cascade(self.inputs, exit=exits), "bare", limit),
            "bare": Row(self.bare()),
        }

    def errors(self) -> dict[str, float]:
        """Of every row, against both encoders on all samples, of which each has its own exit."""
        logits = self.logits()
        first, both = (late_fusion(logits[:s])[0] for s in (1, 2))
        exits = torch.where(self.exits.unsqueeze(1) == 0, first, both)
        by_exit = exits[self.exits.argsort(stable=True)]
        expected = {"full": both, "bare": by_exit}
        results = {name: row.call() for name, row in self.rows().items()}
        results["bare"] = torch.cat(results["bare"])
        return {
            name: relative_error(result, expected.get(name, exits))
            for name, result in results.items()
        }


def contest(setting: CascadeSetting) -> Contest:
    """Rows in the timed dtype; tests/project/test_qmf_benchmarks.py compares in fp64."""
    problem = CascadeProblem(setting)
    return Contest(problem.rows(), problem.errors(), TOLERANCE[setting.dtype], setting.device)
