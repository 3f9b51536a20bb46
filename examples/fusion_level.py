"""Fusion-level DynMM: a second stream runs, and is fused, only as deep as each sample's gate asks.

python examples/fusion_level.py
"""

import torch
from torch import Tensor, nn

from dynmm_kernels import Branch, NestedFusion, resource_loss
from dynmm_kernels.nn import SEAdd

CLASSES, CHANNELS, EPOCHS, BATCH = 4, 8, 12, 64


def samples(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps [N, 8, 6, 6]: colour tells the class, except in dark samples; depth always does."""
    targets = torch.randint(CLASSES, (count,))
    marks = torch.eye(CHANNELS)[targets][:, :, None, None]
    colour, depth = torch.randn(2, count, CHANNELS, 6, 6)
    light = (torch.rand(count, 1, 1, 1) > 1 / 3).float()
    return light * (colour + 2 * marks), depth + 2 * marks, targets


class Gate(nn.Module):
    """Looks at how bright the colours are: logits of the depths 0, 1, 2."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(1, 3)

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return self.score(main.abs().mean((1, 2, 3)).unsqueeze(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        main, aux = ([self.stage() for _ in range(2)] for _ in range(2))
        priced = [Branch(stage, cost=1) for stage in aux]
        fusions = [SEAdd(CHANNELS), SEAdd(CHANNELS)]
        self.backbone = NestedFusion(Gate(), main, priced, fusions)
        self.head = nn.Linear(CHANNELS, CLASSES)

    @staticmethod
    def stage() -> nn.Module:
        return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())

    def forward(self, colour: Tensor, depth: Tensor):
        features, routing = self.backbone(colour, depth, return_routing=True)
        return self.head(features.mean((2, 3))), routing


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    colour, depth, targets = samples(768)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(targets)).split(BATCH):
            logits, routing = model(colour[rows], depth[rows])
            loss = nn.functional.cross_entropy(logits, targets[rows])
            optimizer.zero_grad()
            (loss + 0.1 * resource_loss(routing)).backward()
            optimizer.step()

    colour, depth, targets = samples(600)
    outputs = {}
    for model.backbone.execution in ("masked", "routed"):
        with torch.no_grad():
            outputs[model.backbone.execution], routing = model.eval()(colour, depth)
        print(f"{model.backbone.execution}: rows of main and auxiliary stages {routing.rows_run}")
    gap = (outputs["masked"] - outputs["routed"]).abs().max().item()
    right = (outputs["routed"].argmax(1) == targets).float().mean().item()
    shares = ", ".join(f"{share:.0%}" for share in routing.fractions)
    print(f"accuracy {right:.3f}; depths 0, 1, 2: {shares}; masked and routed differ by {gap:.0e}")


if __name__ == "__main__":
    main()
