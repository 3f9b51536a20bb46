"""Modality-level DynMM: a gate reads the cheap modality, and asks for the costly one if need be.

python examples/modality_level.py
"""

import torch
from torch import Tensor, nn

from dynmm_kernels import Branch, RoutedFusion, branch_costs, resource_loss
from dynmm_kernels.nn import exponential_temperature

CLASSES, EPOCHS, BATCH = 4, 8, 64


def samples(patterns: Tensor, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Text that tells the class, except in every third sample; an image that always does."""
    targets = torch.randint(CLASSES, (count,))
    text = 3 * torch.eye(CLASSES)[targets]
    text[::3] = 0
    image = patterns[targets] + 0.5 * torch.randn(count, *patterns.shape[1:])
    return {"text": text + 0.3 * torch.randn_like(text), "image": image}, targets


def perceptron(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(CLASSES, 32), nn.ReLU(), nn.Linear(32, outputs))


class Both(nn.Module):
    """Late fusion: the logits of both modalities, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.text = perceptron(CLASSES)
        convolutions = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten()]
        self.image = nn.Sequential(*convolutions, nn.Linear(256, CLASSES))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        return self.text(text) + self.image(image)


def model(inputs: dict[str, Tensor]) -> RoutedFusion:
    """Two whole networks as branches, with their cost per sample; the gate reads the text."""
    text, both = perceptron(CLASSES), Both()
    branches = {
        "text": Branch(text, ["text"], cost=branch_costs(text, inputs["text"])),
        "both": Branch(both, ["text", "image"], cost=branch_costs(both, tuple(inputs.values()))),
    }
    return RoutedFusion(Branch(perceptron(2), ["text"]), branches)


def main() -> None:
    torch.manual_seed(0)
    patterns = torch.randn(CLASSES, 3, 6, 6)
    inputs, targets = samples(patterns, 768)
    fusion = model(inputs)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=2e-2)
    for epoch in range(EPOCHS):
        fusion.temperature = exponential_temperature(epoch, EPOCHS, end=0.1)
        for rows in torch.randperm(len(targets)).split(BATCH):
            batch = {name: part[rows] for name, part in inputs.items()}
            choice = "random" if epoch == 0 else None  # Stage I: branches first, then the gate
            logits, routing = fusion(batch, choice=choice, return_routing=True)
            price = resource_loss(routing, costs=[0, 0.3])
            optimizer.zero_grad()
            (nn.functional.cross_entropy(logits, targets[rows]) + price).backward()
            optimizer.step()

    inputs, targets = samples(patterns, 600)
    fusion.eval()
    for execution, choice in {"routed": None, "masked": None, "text": 0, "both": 1}.items():
        fusion.execution = "masked" if execution == "masked" else "routed"
        with torch.no_grad():
            logits, routing = fusion(inputs, choice=choice, return_routing=True)
        right = (logits.argmax(1) == targets).float().mean().item()
        print(f"{execution}: accuracy {right:.3f}, cost {routing.executed_cost:,.0f} per sample")


if __name__ == "__main__":
    main()
