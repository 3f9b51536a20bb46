"""Layers that samples skip or leave, and the masked formulas in plain PyTorch."""

import torch
from models import FEATURES
from torch import Tensor, nn
from torch.nn.functional import one_hot

GATE_GRADS = ["straight_through", "selected", "none"]
EXECUTIONS = ["routed", "masked", "auto"]


class Layer(nn.Module):
    """Reads a mask beside x, and draws nothing."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, dtype=torch.float64)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = torch.tanh(self.linear(x))
        return y if mask is None else y * mask


class Steered(nn.Module):
    """A gate that learns, and that decides what it was told."""

    def __init__(self, decision: list[int] | Tensor, columns: int) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, columns, dtype=torch.float64)
        self.told = 2 * one_hot(torch.as_tensor(decision, dtype=torch.int64), columns).double()

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        own = self.linear(x)
        return own - own.detach() + self.told


def hard(logits: Tensor, mode: str, temperature: float = 1.0) -> Tensor:
    """[N, B]: weights of masked execution with the gradient of a mode."""
    probs = (logits / temperature).softmax(1)
    if mode == "dense":
        return probs
    chosen = one_hot(logits.argmax(1), logits.shape[1]).to(probs.dtype)
    weights = chosen - probs.detach() + probs
    return learning(weights, chosen, mode)


def learning(weights: Tensor, chosen: Tensor, mode: str) -> Tensor:
    if mode == "none":
        return weights.detach()
    return torch.where(chosen > 0.5, weights, 0.0) if mode == "selected" else weights


def column(weight: Tensor, like: Tensor) -> Tensor:
    return weight.reshape(-1, *[1] * (like.ndim - 1))


def skipped(weights: Tensor, layer: nn.Module, x: Tensor, *others: Tensor) -> Tensor:
    """y = w_1 layer(x) + w_0 x."""
    y = layer(x, *others)
    return column(weights[:, 1], y) * y + column(weights[:, 0], x) * x


def left(weights: Tensor, layers, heads, x: Tensor, *others: Tensor) -> Tensor:
    """y = sum over d of w_d head_d(x_d)."""
    total, depths = 0.0, [None, *layers]
    for d, layer in enumerate(depths):
        x = x if layer is None else layer(x, *others)
        y = x if heads is None else heads[d](x)
        total = total + column(weights[:, d], y) * y
    return total
