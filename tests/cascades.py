"""Cascades to be tested, and the oracle: one sample at a time, in plain PyTorch."""

import math

import torch
from models import FEATURES, mlp
from torch import Tensor, nn

from dynmm_kernels import Branch, CascadeFusion

N, CLASSES, STAGES = 24, 4, 3
NAN, INF = float("nan"), float("inf")


def probability(x: Tensor) -> Tensor:
    return x.exp().max() / x.exp().sum()


def margin(x: Tensor) -> Tensor:
    probs = sorted((x.exp() / x.exp().sum()).unbind())
    return probs[-1] - probs[-2]


def entropy(x: Tensor) -> Tensor:
    probs = x.exp() / x.exp().sum()
    return 1 + sum(p * p.log() for p in probs) / math.log(len(x))


def energy(x: Tensor) -> Tensor:
    return x.exp().sum().log()


class Weigh(nn.Module):
    """A fuse with a weight for each stage."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))

    def forward(self, logits: list[Tensor]) -> Tensor:
        return sum(w * x for w, x in zip(self.weights, logits, strict=False))


SCORES = {
    "probability": ("probability", probability),
    "margin": ("margin", margin),
    "entropy": ("entropy", entropy),
    "energy": ("energy", energy),
    "callable": (lambda x: x[:, 0] - x[:, 1], lambda x: x[0] - x[1]),
}
FUSES = {
    "energy": (lambda: "energy", lambda xs: sum(0.1 * energy(x) * x for x in xs)),
    "mean": (lambda: "mean", lambda xs: sum(xs) / len(xs)),
    "last": (lambda: "last", lambda xs: xs[-1]),
    "module": (Weigh, None),
}


def loop(stages, selects, fuse, score, thresholds):
    """A cascade as a call; `call.exits` is where the samples of the last one left."""

    def call(*inputs):
        first = inputs[0]
        size = len(next(iter(first.values())) if isinstance(first, dict) else first)
        outputs, call.exits = [], []
        for n in range(size):
            row = [
                {k: v[n : n + 1] for k, v in x.items()} if isinstance(x, dict) else x[n : n + 1]
                for x in inputs
            ]
            logits = []
            for s, (stage, select) in enumerate(zip(stages, selects, strict=True)):
                logits.append(stage(*select(*row))[0])
                fused = fuse(logits)
                if s == len(stages) - 1 or score(fused) >= thresholds[s]:
                    break
            outputs.append(fused)
            call.exits.append(s)
        return torch.stack(outputs)

    return call


def between(scores: list[float]) -> float:
    """A threshold that half of the scores reach, none of them narrowly."""
    ordered = sorted(scores)
    return (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2


def thresholds_for(stages, selects, fuse, score, inputs) -> list[float]:
    """Thresholds at which half of those who come to a stage leave."""
    thresholds = []
    for s in range(len(stages) - 1):
        stop = loop(stages[: s + 1], selects[: s + 1], fuse, score, thresholds)
        with torch.no_grad():
            fused = stop(*inputs)
        came = [float(score(x)) for x, e in zip(fused, stop.exits, strict=True) if e == s]
        thresholds.append(between(came))
    return thresholds


def samples(n: int = N, dtype=torch.float64) -> Tensor:
    return torch.randn(n, FEATURES, dtype=dtype)


def networks(count: int = STAGES) -> list[nn.Module]:
    return [mlp(CLASSES) for _ in range(count)]


def positions(s: int):
    return lambda *x: (x[s],)


READS = {
    "positions": ([[0], [1], [2]], [positions(s) for s in range(STAGES)]),
    "keys": ([["a"], ["b"], ["c"]], [lambda x, k=k: (x[k],) for k in "abc"]),
    "a callable": ([lambda x, y, z, s=s: (x, y, z)[s] for s in range(STAGES)],) * 2,
}
READS["a callable"] = (READS["a callable"][0], [positions(s) for s in range(STAGES)])


def three_inputs(reads: str = "positions") -> tuple:
    parts = [samples() for _ in range(STAGES)]
    return (dict(zip("abc", parts, strict=True)),) if reads == "keys" else tuple(parts)


def cascade_of(stages, reads="positions", **options) -> CascadeFusion:
    inputs = READS[reads][0]
    named = [Branch(m, inputs=i, cost=c) for m, i, c in zip(stages, inputs, (1, 2, 4), strict=True)]
    return CascadeFusion(named, **options).eval()


class Told(nn.Module):
    """Confident, by 9, of the rows whose first number is at least `level`."""

    def __init__(self, level: float):
        super().__init__()
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        sure = 9 * (x[:, :1] >= self.level).to(x.dtype)
        return torch.cat([sure + x[:, 1:2] * 1e-3, x[:, 1:3] * 1e-3], 1)


def told(**options) -> CascadeFusion:
    """Samples whose first number is 2 leave first, those of 1 second, those of 0 at the end."""
    stages = [Branch(Told(2), cost=1), Branch(Told(1), cost=3), Branch(Told(0), cost=10)]
    return CascadeFusion(stages, fuse="last", **options).eval()


def planned(levels: list[int]) -> Tensor:
    x = torch.randn(len(levels), 3, dtype=torch.float64)
    x[:, 0] = torch.tensor(levels)
    return x


SPLITS = {
    "mixed": [2, 0, 1, 1, 0, 2, 2, 0],
    "nobody leaves": [0, 0, 0],
    "all leave first": [2, 2, 2, 2],
    "all leave second": [1, 1, 1],
    "nobody leaves second": [0, 2, 0, 2],
    "nobody leaves first": [1, 0, 0, 1],
    "one sample, first": [2],
    "one sample, last": [0],
}
