"""The modality-level models of DynMM (Xue & Marculescu, 2023), in plain PyTorch.

Names follow the paper: E1 is the cheap expert, E2 the costly one, and the gate chooses between
them. They know nothing of routing. Inputs are what the authors' training code passes around, an
image-and-text list (MM-IMDB) or a pack of sequences and their lengths (CMU-MOSEI).
"""

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Maxout(nn.Module):
    """The larger of two linear maps, feature by feature."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear(x).chunk(2, dim=-1)
        return torch.maximum(first, second)


class MaxoutMLP(nn.Sequential):
    """Two maxout layers between batch norms."""

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float):
        super().__init__(
            nn.BatchNorm1d(inputs),
            Maxout(inputs, hidden),
            nn.BatchNorm1d(hidden),
            nn.Dropout(dropout),
            Maxout(hidden, outputs),
            nn.BatchNorm1d(outputs),
            nn.Dropout(dropout),
        )


class ImdbE1(nn.Sequential):
    """Text alone: text [n, 300] -> genre logits [n, 23]."""

    def __init__(self):
        super().__init__(MLP(300, 512, 512), MLP(512, 512, 23))


class ImdbE2(nn.Module):
    """Late fusion: [text [n, 300], image [n, 4096]] -> genre logits [n, 23]."""

    def __init__(self, dropout: float):
        super().__init__()
        self.text = MaxoutMLP(300, 512, 512, dropout)
        self.image = MaxoutMLP(4096, 1024, 512, dropout)
        self.head = nn.Linear(1024, 23)

    def forward(self, x: list[Tensor]) -> Tensor:
        text, image = x
        return self.head(torch.cat([self.text(text), self.image(image)], dim=1))


class ImdbGate(nn.Module):
    """[text, image] -> logits [n, 2]."""

    def __init__(self):
        super().__init__()
        self.mlp = MLP(4396, 128, 2)

    def forward(self, x: list[Tensor]) -> Tensor:
        return self.mlp(torch.cat(x, dim=1))


class SequenceEncoder(nn.Module):
    """[sequence [n, T, features], lengths [n]] -> the last step [n, width].

    The lengths are ignored, as MultiBench's Transformer ignores them: padding is part of the
    sequence, so a sample's result depends on T but not on the other samples of its batch.
    """

    def __init__(self, features: int, width: int, dropout: float):
        super().__init__()
        self.project = nn.Conv1d(features, width, kernel_size=1, bias=False)
        layer = nn.TransformerEncoderLayer(width, nhead=5, dropout=dropout)
        self.encoder = nn.TransformerEncoder(layer, num_layers=5, enable_nested_tensor=False)

    def forward(self, x: list[Tensor]) -> Tensor:
        sequence, _ = x
        steps = self.project(sequence.transpose(1, 2)).permute(2, 0, 1)  # [T, n, width]
        return self.encoder(steps)[-1]


class MoseiE1(nn.Sequential):
    """Text alone: [text [n, T, 300], lengths [n]] -> sentiment [n, 1]."""

    def __init__(self, dropout: float):
        super().__init__(SequenceEncoder(300, 120, dropout), MLP(120, 64, 1))


class MoseiE2(nn.Module):
    """Late fusion of [[video, audio, text], [their lengths]] -> sentiment [n, 1]."""

    def __init__(self, dropout: float):
        super().__init__()
        self.encoders = nn.ModuleList(
            [
                SequenceEncoder(35, 60, dropout),
                SequenceEncoder(74, 120, dropout),
                SequenceEncoder(300, 120, dropout),
            ]
        )
        self.head = MLP(300, 128, 1)

    def forward(self, x: list[list[Tensor]]) -> Tensor:
        encoded = [
            encoder([sequence, lengths])
            for encoder, sequence, lengths in zip(self.encoders, *x, strict=True)
        ]
        return self.head(torch.cat(encoded, dim=1))


class MoseiGate(nn.Module):
    """[[video, audio, text], [their lengths]] -> logits [n, 2]."""

    def __init__(self, dropout: float):
        super().__init__()
        self.encoder = SequenceEncoder(409, 10, dropout)
        self.head = nn.Linear(10, 2)

    def forward(self, x: list[list[Tensor]]) -> Tensor:
        sequences, lengths = x
        return self.head(self.encoder([torch.cat(sequences, dim=2), lengths[0]]))
