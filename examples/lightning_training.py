"""A gate learns, under Lightning, which samples need their image.

pip install lightning && python examples/lightning_training.py
"""

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynmm_kernels import Branch, RoutedFusion, resource_loss
from dynmm_kernels.nn import Usage

CLASSES, SAMPLES, EPOCHS = 4, 768, 6


def samples() -> TensorDataset:
    """Text that tells the class, except in every third sample; an image that always does."""
    targets = torch.randint(CLASSES, (SAMPLES,))
    text = 3 * torch.eye(CLASSES)[targets]
    text[::3] = 0
    image = torch.randn(CLASSES, 3, 6, 6)[targets]
    noise = 0.3 * torch.randn_like(text), 0.5 * torch.randn_like(image)
    return TensorDataset(text + noise[0], image + noise[1], targets)


def perceptron(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(CLASSES, 32), nn.ReLU(), nn.Linear(32, outputs))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        image = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, CLASSES))
        branches = {
            "text": Branch(perceptron(CLASSES), inputs="text", cost=0),
            "image": Branch(image, inputs="image", cost=1),
        }
        self.fusion = RoutedFusion(Branch(perceptron(2), inputs="text"), branches)
        self.usage = Usage()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        text, image, targets = batch
        inputs = {"text": text, "image": image}
        choice = "random" if self.current_epoch == 0 else None  # branches first, then the gate
        logits, routing = self.fusion(inputs, choice=choice, return_routing=True)
        self.usage.add(routing)  # on the device; waits for nothing
        loss = nn.functional.cross_entropy(logits, targets) + 0.3 * resource_loss(routing)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics["loss"].item()
        text, image = self.usage.read().fractions
        self.usage.reset()
        shares = f"text {text:.0%}, image {image:.0%}"
        self.print(f"epoch {self.current_epoch}: loss {loss:.3f}; {shares}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-2)


def main() -> None:
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), DataLoader(samples(), batch_size=64, shuffle=True))


if __name__ == "__main__":
    main()
