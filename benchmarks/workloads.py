"""What is measured: two published models and a trivial one, with exact gate decisions.

A workload is a gate, its branches, inputs, targets and a table of costs. Weights and inputs are
random; the decisions are planned (:class:`PlannedGate`), so that a batch of N samples sends
exactly ``round(p * N)`` of them to E2 and no gate noise enters a timing.

    workload = WORKLOADS["mosei"]
    gate, experts = workload.make_model(torch.float32)
    inputs = workload.make_inputs(32, torch.float32)
    choice = planned_choice(32, p=0.164)
    gate = PlannedGate(gate, planned_logits(choice))
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import models
from benchmarks.ceilings import Costs
from benchmarks.nyud import MIXES, PATHS


class Expert(nn.Module):
    """A branch and the part of the input that it reads; None: all of it."""

    def __init__(self, module: nn.Module, view: Callable[[Any], Any] | None = None):
        super().__init__()
        self.module = module
        self.view = view

    def forward(self, x: Any) -> Tensor:
        return self.module(self.read(x))

    def read(self, x: Any) -> Any:
        """What its module is given."""
        return x if self.view is None else self.view(x)


class PlannedGate(nn.Module):
    """Runs the real gate, whose cost is paid, and answers with planned logits.

    The planned values replace the real ones, the real gate still receives its gradient.
    """

    planned: Tensor

    def __init__(self, gate: nn.Module, planned: Tensor):
        super().__init__()
        self.gate = gate
        self.register_buffer("planned", planned)

    def forward(self, *inputs: Any) -> Tensor:
        real = self.gate(*inputs)
        return self.planned.to(real.dtype) + (real - real.detach())


def planned_choice(n: int, p: float, seed: int = 0) -> Tensor:
    """int64 [n]: exactly ``round(p * n)`` ones (E2) among zeros (E1), shuffled."""
    choice = (torch.arange(n) < round(p * n)).long()
    return choice[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


def planned_depths(n: int, mix: str, seed: int = 0) -> Tensor:
    """int64 [n]: each path as often as its share says (largest remainders), shuffled."""
    exact = [n * share for share in MIXES[mix]]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(PATHS), key=lambda d: counts[d] - exact[d])
    for d in by_remainder[: n - sum(counts)]:
        counts[d] += 1
    depths = torch.repeat_interleave(torch.arange(PATHS), torch.tensor(counts))
    return depths[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


def planned_logits(choice: Tensor, num_branches: int = 2, margin: float = 2.0) -> Tensor:
    """Logits [n, num_branches] whose argmax is ``choice``, far from a saturated softmax."""
    return margin * F.one_hot(choice, num_branches).float()


@dataclass(frozen=True)
class Workload:
    name: str
    make_model: Callable[..., tuple[nn.Module, dict[str, Expert]]]
    """(dtype, dropout=the paper's, seed=0) -> gate, {name: Expert}, on the CPU, in train mode."""
    make_inputs: Callable[..., Any]
    """(n, dtype, seed=0) -> the one argument that gate and experts take."""
    make_target: Callable[..., Tensor]
    """(n, dtype, seed=1) -> what ``loss(output, target)`` wants."""
    loss: Callable[[Tensor, Tensor], Tensor]
    costs: Costs
    probabilities: tuple[float, ...]
    """p(E2) of the full table: none, what the paper's models imply, one half, all."""
    batches: tuple[int, ...]
    quick: tuple[tuple[int, float], ...]
    """(n, p) of the quick profile, inference."""
    quick_training: tuple[tuple[int, float], ...]

    @property
    def example(self) -> Any:
        """A small input, enough to count costs with."""
        return self.make_inputs(2, torch.float32)


def _seeded(build: Callable[[], tuple[nn.Module, dict[str, Expert]]], dtype, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate, experts = build()
    return gate.to(dtype), {name: expert.to(dtype) for name, expert in experts.items()}


def _randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def imdb_model(dtype: torch.dtype, dropout: float = 0.3, seed: int = 0):
    def build():
        e1 = Expert(models.ImdbE1(), lambda x: x[0])
        return models.ImdbGate(), {"e1": e1, "e2": Expert(models.ImdbE2(dropout))}

    return _seeded(build, dtype, seed)


def imdb_inputs(n: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """[text [n, 300], image [n, 4096]]"""
    both = _randn(n, 4396, dtype=dtype, seed=seed)
    return [both[:, :300].contiguous(), both[:, 300:].contiguous()]


def imdb_target(n: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return (_randn(n, 23, dtype=torch.float32, seed=seed) > 1).to(dtype)


def mosei_model(dtype: torch.dtype, dropout: float = 0.1, seed: int = 0):
    def build():
        e1 = Expert(models.MoseiE1(dropout), lambda x: [x[0][2], x[1][2]])
        return models.MoseiGate(dropout), {"e1": e1, "e2": Expert(models.MoseiE2(dropout))}

    return _seeded(build, dtype, seed)


def mosei_inputs(n: int, dtype: torch.dtype, seed: int = 0, steps: int = 50) -> list[list[Tensor]]:
    """[[video [n, T, 35], audio [n, T, 74], text [n, T, 300]], [lengths [n]] * 3]"""
    features = (35, 74, 300)
    sequences = [_randn(n, steps, f, dtype=dtype, seed=seed + i) for i, f in enumerate(features)]
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(steps // 2, steps + 1, (n,), generator=generator)
    return [sequences, [lengths.clone() for _ in features]]


def mosei_target(n: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return _randn(n, 1, dtype=dtype, seed=seed)


def trivial_model(dtype: torch.dtype, dropout: float = 0.0, seed: int = 0):
    def build():
        experts = {"e1": Expert(nn.Linear(16, 16)), "e2": Expert(nn.Linear(16, 16))}
        return nn.Linear(16, 2), experts

    return _seeded(build, dtype, seed)


def trivial_inputs(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return _randn(n, 16, dtype=dtype, seed=seed)


# A flop counter sees matrix products only. The authors' figures hold two elementwise operations
# per batch-normed feature of E2 besides, on 300, 512, 512 (text) and 4096, 1024, 512 (image).
IMDB_BATCH_NORM = 2 * (300 + 512 + 512 + 4096 + 1024 + 512)

WORKLOADS = {
    "imdb": Workload(
        name="imdb",
        make_model=imdb_model,
        make_inputs=imdb_inputs,
        make_target=imdb_target,
        loss=F.binary_cross_entropy_with_logits,
        costs=Costs(gate=562_944, branches=(689_664, 10_292_224 + IMDB_BATCH_NORM)),
        probabilities=(0.0, 0.036, 0.5, 0.681, 0.889, 1.0),
        batches=(1, 128, 1024, 8192),
        quick=(
            *((128, p) for p in (0.0, 0.036, 0.5, 0.681, 1.0)),
            *((1024, p) for p in (0.036, 0.5, 0.681, 1.0)),
        ),
        quick_training=((128, 0.036), (128, 0.681)),
    ),
    "mosei": Workload(
        name="mosei",
        make_model=mosei_model,
        make_inputs=mosei_inputs,
        make_target=mosei_target,
        loss=F.l1_loss,
        costs=Costs(gate=10_794_520, branches=(142_087_744, 349_487_528)),
        probabilities=(0.0, 0.164, 0.451, 0.646, 0.869, 1.0),
        batches=(1, 32, 128, 512, 2048),
        quick=tuple((32, p) for p in (0.0, 0.164, 0.646, 1.0)),
        quick_training=((16, 0.164),),
    ),
    # Nearly no arithmetic: what is left is the price of routing itself.
    "trivial": Workload(
        name="trivial",
        make_model=trivial_model,
        make_inputs=trivial_inputs,
        make_target=trivial_inputs,
        loss=F.mse_loss,
        costs=Costs(gate=32, branches=(256, 256)),
        probabilities=(0.5,),
        batches=(1, 32, 128, 1024),
        quick=((1, 0.5), (128, 0.5)),
        quick_training=((128, 0.5),),
    ),
}
