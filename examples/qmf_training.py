"""QMF on handwritten digits, upper and lower half as two modalities, with and without ranking loss.

python examples/qmf_training.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dynmm_kernels import EnergyFusion, QualityHistory, quality_rank_loss
from dynmm_kernels.measure.noise import corrupt

EPOCHS, BATCH, DRAWS = 20, 64, 10
NOISE = (0, 50, 100)  # standard deviations, of pixels in 0..255
MODALITIES = 2


def encoder() -> nn.Module:
    """Half of an image -> logits of ten classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def train(halves: tuple[Tensor, ...], targets: Tensor, rank_weight: float) -> EnergyFusion:
    """Losses: of the fused logits, of both encoders, and of how their confidences are ranked."""
    torch.manual_seed(0)
    fusion = EnergyFusion([encoder() for _ in range(MODALITIES)])
    history = QualityHistory(len(targets), MODALITIES)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(targets)).split(BATCH):
            batch = [half[rows] for half in halves]
            output = fusion(*batch, targets=targets[rows])
            history.update(rows, output.losses[:, :-1])
            ranking = quality_rank_loss(output.confidence, rows, history)
            loss = output.losses.mean(0).sum() + rank_weight * ranking.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return fusion.eval()


@torch.no_grad()
def accuracy(
    fusion: EnergyFusion, halves: tuple[Tensor, ...], targets: Tensor, epsilon: float
) -> float:
    """Over several draws of noise, in which half of all halves are noisy."""
    generator = torch.Generator().manual_seed(1)
    right = 0
    for _ in range(DRAWS):
        noisy = corrupt(halves, epsilon=epsilon, generator=generator).modalities
        right += (fusion(*noisy).argmax(1) == targets).sum().item()
    return right / (DRAWS * len(targets))


def main() -> None:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
    halves, targets = images.split(4, dim=1), torch.tensor(digits.target)[order]
    seen, held = ([half[rows] for half in halves] for rows in (slice(1200), slice(1200, None)))

    print("ranking loss  " + "  ".join(f"noise {epsilon:3}" for epsilon in NOISE))
    for rank_weight in (0.0, 1.0):
        fusion = train(seen, targets[:1200], rank_weight)
        scores = [accuracy(fusion, held, targets[1200:], epsilon) for epsilon in NOISE]
        print(f"{rank_weight:12}  " + "  ".join(f"{score:9.3f}" for score in scores))


if __name__ == "__main__":
    main()
