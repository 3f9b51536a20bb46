"""Samples that lack modalities, trained under Accelerate in bfloat16.

pip install accelerate && python examples/accelerate_training.py
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynmm_kernels import Branch, RoutedFusion, collate_modalities
from dynmm_kernels.nn import Usage

CLASSES, SAMPLES, EPOCHS = 4, 512, 4
NAMES = ["text", "image"]

Sample = tuple[dict[str, Tensor], int]


def samples() -> list[Sample]:
    """Of three samples one has a text, one an image, one both."""
    patterns = torch.randn(CLASSES, 3, 6, 6)
    made: list[Sample] = []
    for index, target in enumerate(torch.randint(CLASSES, (SAMPLES,)).tolist()):
        text = 3 * torch.eye(CLASSES)[target] + 0.3 * torch.randn(CLASSES)
        image = patterns[target] + 0.5 * torch.randn(3, 6, 6)
        parts = ({"text": text}, {"image": image}, {"text": text, "image": image})[index % 3]
        made.append((parts, target))
    return made


def collate(batch: list[Sample]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs by modality, who has which as bool [N, 2], and targets."""
    inputs, present = collate_modalities([parts for parts, _ in batch], NAMES)
    mask = torch.stack([present[name] for name in NAMES], 1)
    return inputs, mask, torch.tensor([target for _, target in batch])


def model() -> RoutedFusion:
    """The logits of the modalities that are there, summed; the gate is not asked."""
    text = nn.Linear(CLASSES, CLASSES)
    image = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, CLASSES))
    encoders = {"text": Branch(text, inputs="text"), "image": Branch(image, inputs="image")}
    return RoutedFusion(None, encoders)


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    fusion = model()
    optimizer = torch.optim.Adam(fusion.parameters(), lr=1e-2)
    loader = DataLoader(samples(), batch_size=64, shuffle=True, collate_fn=collate)
    fusion, optimizer, loader = accelerator.prepare(fusion, optimizer, loader)
    for epoch in range(EPOCHS):
        usage, total = Usage(), 0.0
        for inputs, mask, targets in loader:
            logits, routing = fusion(inputs, choice=mask, return_routing=True)
            loss = nn.functional.cross_entropy(logits, targets)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            usage.add(routing)
            total += loss.item() / len(loader)
        text, image = usage.read().fractions
        accelerator.print(f"epoch {epoch}: loss {total:.3f}; text {text:.0%}, image {image:.0%}")


if __name__ == "__main__":
    main()
