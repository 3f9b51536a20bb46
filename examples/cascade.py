"""A cascade on handwritten digits: a strip of the image first, more of it where that is unsure.

python examples/cascade.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dynmm_kernels import Branch, CascadeFusion, branch_costs, deep_supervision_loss

EPOCHS, BATCH = 30, 64


def stage(name: str, features: int, hidden: int) -> Branch:
    """A network that reads the part called `name`."""
    layers = [nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Linear(hidden, 10))
    cost = branch_costs(module, torch.zeros(1, features))
    return Branch(module, inputs=[name], name=name, cost=cost)


def parts_of(images: Tensor) -> dict[str, Tensor]:
    """Two rows of eight in the middle, the other six, and the image again."""
    border = torch.cat([images[:, :3], images[:, 5:]], 1)
    parts = {"strip": images[:, 3:5], "border": border, "image": images}
    return {name: part.flatten(1) for name, part in parts.items()}


def accuracy(logits: Tensor, targets: Tensor) -> float:
    return (logits.argmax(1) == targets).float().mean().item()


def train(cascade: CascadeFusion, images: Tensor, targets: Tensor) -> None:
    """Every stage on every sample; each exit has its loss."""
    optimizer = torch.optim.Adam(cascade.train().parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            _, routing = cascade(parts_of(images[rows]), return_routing=True)
            optimizer.zero_grad()
            deep_supervision_loss(routing, targets[rows]).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
    targets = torch.tensor(digits.target)[order]
    stages = [stage("strip", 16, 32), stage("border", 48, 64), stage("image", 64, 512)]
    cascade = CascadeFusion(stages, fuse="mean")
    train(cascade, images[:1200], targets[:1200])

    cascade.eval()
    held_out = [((parts_of(images[1200:1500]),), targets[1200:1500])]
    calibration = cascade.calibrate(held_out, risk="gap", target=0.05)
    print(calibration.guarantee)
    inputs, wanted = parts_of(images[1500:]), targets[1500:]
    print(f"{'threshold':>10}  {'accuracy':>8}  {'cost':>8}  share leaving after each stage")
    choices = {"inf": float("inf"), "0.9": 0.9, "calibrated": calibration.thresholds}
    for name, threshold in choices.items():
        cascade.threshold = threshold
        with torch.no_grad():
            output, routing = cascade(inputs, return_routing=True)
        exits = zip(inputs, routing.fractions, strict=True)
        shares = ", ".join(f"{part} {share:.0%}" for part, share in exits)
        scored = f"{accuracy(output, wanted):8.3f}  {routing.executed_cost:8,.0f}"
        print(f"{name:>10}  {scored}  {shares}")


if __name__ == "__main__":
    main()
