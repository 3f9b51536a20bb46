"""The whole idea on handwritten digits, in under a minute on two CPU cores.

Every 8x8 digit of scikit-learn is seen twice: as a 4x4 thumbnail and in full. Branch E1 is a small
network that reads only the thumbnail; branch E2 is a convolutional network that fuses both views
and costs twenty times as much. A gate looks at the thumbnail and decides which of the two a digit
deserves. It learns to be thrifty, because what it spends is part of the loss. The held-out half is
then classified by the same trained model dense, masked and routed; masked and routed must agree,
what differs is the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measure.costs import branch_costs
from ..nn import Branch, RoutedFusion, resource_loss

E1, E2 = 0, 1
TRAIN_BATCH = 64
FEATURES = 512  # of the full image
COST_WEIGHT = 0.07  # of the resource loss; larger sends more digits to E1
BRANCHES, TOGETHER = "branches", "gate and branches"
RATES = {  # stage: peak learning rates of gate, E1, E2
    BRANCHES: [0.0, 1e-2, 3e-3],
    TOGETHER: [5e-3, 3e-4, 3e-4],
}

Views = dict[str, Tensor]


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] in -1..1 and labels [N], halved into training and test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Digits:
    """Read the digits that ship inside scikit-learn: nothing is downloaded."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise SystemExit(f"the demo needs scikit-learn ({error}): pip install '.[demo]'") from None
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order.chunk(2)
    return Digits(images[train], labels[train], images[test], labels[test])


def views(images: Tensor) -> Views:
    """The two modalities: a 4x4 thumbnail and the full image."""
    return {"low": F.avg_pool2d(images, 2), "full": images}


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift every image a little.

    Without it both branches know the training digits by heart, and a gate that never meets a
    mistake learns nothing.
    """
    turn, scale, right, down = (torch.rand(4, len(images), generator=generator) - 0.5) * 0.16
    cos, sin = torch.cos(turn) + scale, torch.sin(turn)
    matrix = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def perceptron(hidden: int, outputs: int) -> nn.Sequential:
    """A network over the thumbnail alone."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(16, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


class FusedNet(nn.Module):
    """The costly branch: convolutions over the enlarged image, fused with the thumbnail."""

    def __init__(self) -> None:
        super().__init__()
        self.full = convolutions()
        self.low = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU())
        self.head = nn.Linear(FEATURES + 32, 10)

    def forward(self, low: Tensor, full: Tensor) -> Tensor:
        return self.head(torch.cat([self.full(full), self.low(low)], dim=1))


def convolutions(width: int = FEATURES // 32) -> nn.Sequential:
    """A network from the full image to FEATURES numbers."""
    layers: list[nn.Module] = [nn.Upsample(scale_factor=2, mode="bilinear")]
    for before, after in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten())


def part(module: nn.Module, sample: Views, *inputs: str) -> Branch:
    """A branch that knows what it reads and its cost in millions of MACs per sample."""
    macs = branch_costs(module, tuple(sample[name] for name in inputs))
    return Branch(module, inputs=inputs, cost=macs / 1e6)


def build(sample: Views) -> RoutedFusion:
    """The model."""
    gate, easy, hard = perceptron(256, 2), perceptron(256, 10), FusedNet()
    branches = {"E1": part(easy, sample, "low"), "E2": part(hard, sample, "low", "full")}
    return RoutedFusion(part(gate, sample, "low"), branches, execution="routed")


def train(
    fusion: RoutedFusion,
    digits: Digits,
    epochs: int,
    generator: torch.Generator,
    advance: Callable[[str], None],
    stages: Sequence[str] = tuple(RATES),
    cost_weight: float = COST_WEIGHT,
) -> None:
    """DynMM's two stages: first the branches, each on every sample; then the gate with them.

    In the second stage the gate decides hard, and the straight-through gradient tells it what the
    other choice would have been worth.
    """
    steps = epochs * -(-len(digits.train_labels) // TRAIN_BATCH)
    fusion.train()
    gate, easy, hard = fusion.gate, *fusion.branches
    for stage in stages:
        groups = [{"params": part.parameters()} for part in (gate, easy, hard)]
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATES[stage], total_steps=steps)
        for _ in range(epochs):
            order = torch.randperm(len(digits.train_labels), generator=generator)
            for rows in order.split(TRAIN_BATCH):
                batch = views(jitter(digits.train_images[rows], generator))
                labels = digits.train_labels[rows]
                if stage == BRANCHES:
                    loss = F.cross_entropy(fusion(batch, choice=E1), labels)
                    loss = loss + F.cross_entropy(fusion(batch, choice=E2), labels)
                else:
                    logits, routing = fusion(batch, return_routing=True)
                    loss = F.cross_entropy(logits, labels) + cost_weight * resource_loss(routing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            advance(f"training {stage}")
    fusion.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, so that a seed gives the same model on any number of cores.

    Batches this small gain little from threads, and lose much where the cores are shared.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
