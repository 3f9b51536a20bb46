"""A gate learns, under the Trainer of Hugging Face, which samples need their image.

pip install transformers accelerate && python examples/huggingface_training.py
"""

from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from dynmm_kernels import Branch, RoutedFusion, resource_loss
from dynmm_kernels.nn import Usage

CLASSES, SAMPLES, EPOCHS = 4, 768, 6


def samples() -> list[dict[str, Tensor]]:
    """Text that tells the class, except in every third sample; an image that always does."""
    patterns = torch.randn(CLASSES, 3, 6, 6)
    made = []
    for index, target in enumerate(torch.randint(CLASSES, (SAMPLES,))):
        text = 3 * torch.eye(CLASSES)[target] * (index % 3 > 0) + 0.3 * torch.randn(CLASSES)
        image = patterns[target] + 0.5 * torch.randn(3, 6, 6)
        made.append({"text": text, "image": image, "labels": target})
    return made


def perceptron(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(CLASSES, 32), nn.ReLU(), nn.Linear(32, outputs))


class Model(nn.Module):
    """What the Trainer calls: keyword arguments in, a dict with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        image = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, CLASSES))
        branches = {
            "text": Branch(perceptron(CLASSES), inputs="text", cost=0),
            "image": Branch(image, inputs="image", cost=1),
        }
        self.fusion = RoutedFusion(Branch(perceptron(2), inputs="text"), branches)
        self.usage = Usage()
        self.choice: str | None = "random"  # the gate decides once the branches have learned

    def forward(self, text: Tensor, image: Tensor, labels: Tensor) -> dict[str, Tensor]:
        inputs = {"text": text, "image": image}
        logits, routing = self.fusion(inputs, choice=self.choice, return_routing=True)
        self.usage.add(routing)
        loss = nn.functional.cross_entropy(logits, labels) + 0.3 * resource_loss(routing)
        return {"loss": loss, "logits": logits}


class Report(TrainerCallback):
    """Prints the loss of an epoch and what ran in it, in place of the Trainer's own lines."""

    def on_log(self, args, state, control, logs=None, model=None, **rest) -> None:
        if "loss" in logs:
            text, image = model.usage.read().fractions
            model.usage.reset()
            model.choice = None
            loss = f"epoch {logs['epoch']:.0f}: loss {float(logs['loss']):.3f}"
            print(f"{loss}; text {text:.0%}, image {image:.0%}")


def main() -> None:
    settings = {"learning_rate": 2e-2, "lr_scheduler_type": "constant", "num_train_epochs": EPOCHS}
    settings |= {"logging_strategy": "epoch", "save_strategy": "no", "disable_tqdm": True}
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        args = TrainingArguments(folder, per_device_train_batch_size=64, use_cpu=True, **settings)
        trainer = Trainer(Model(), args, train_dataset=samples(), callbacks=[Report])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
