"""An early exit inside one network: the layers behind it run on the samples that are unsure.

python examples/early_exit.py    (modalities one after the other: cascade.py)
"""

import torch
from torch import Tensor, nn

from dynmm_kernels import Branch, EarlyExit
from dynmm_kernels.nn import ConfidenceGate

CLASSES, FEATURES, WIDTH, EPOCHS, BATCH = 4, 8, 64, 12, 64


def samples(centres: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each class has two places, so that a plain classifier is unsure of many samples."""
    place = torch.randint(2 * CLASSES, (count,))
    return centres[place] + 0.5 * torch.randn(count, FEATURES), place % CLASSES


def layers(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(count)))


class Model(nn.Module):
    """Some layers, an exit, more layers, a head."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.start = nn.Linear(FEATURES, WIDTH)
        heads = [nn.Linear(WIDTH, CLASSES) for _ in range(2)]
        gate = ConfidenceGate(heads[0], threshold)
        self.exits = EarlyExit(gate, [Branch(layers(4), cost=4)], heads)

    def forward(self, x: Tensor, depth: int | None = None):
        return self.exits(self.start(x), depth=depth, return_routing=True)


def main() -> None:
    torch.manual_seed(0)
    centres = torch.randn(2 * CLASSES, FEATURES)
    x, targets = samples(centres, 1024)
    model = Model(threshold=0.9)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(targets)).split(BATCH):
            optimizer.zero_grad()
            for depth in range(2):  # in training each sample takes both exits, with a loss each
                logits, _ = model(x[rows], depth=depth)
                nn.functional.cross_entropy(logits, targets[rows]).backward()
            optimizer.step()

    x, targets = samples(centres, 1000)
    model.eval()
    print(f"{'threshold':>9}  {'accuracy':>8}  {'exit':>5}  layers per sample")
    for threshold in (0.0, 0.7, 0.9, 0.99, 1.1):
        model.exits.gate.module.threshold = threshold
        with torch.no_grad():
            logits, routing = model(x)
        right = (logits.argmax(1) == targets).float().mean().item()
        left = routing.fractions[0]
        print(f"{threshold:9}  {right:8.3f}  {left:5.0%}  {routing.executed_cost:.2f}")


if __name__ == "__main__":
    main()
