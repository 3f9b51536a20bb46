"""A batch in which samples lack modalities: each encoder runs on those that have its own.

python examples/missing_modality.py
"""

import torch
from torch import Tensor, nn

from dynmm_kernels import Branch, EnergyFusion, RoutedFusion, collate_modalities

CLASSES = 5
ENCODERS = {
    "text": nn.Sequential(nn.EmbeddingBag(100, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    "image": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, CLASSES)),
    "audio": nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
}
SAMPLES = (("text", "image", "audio"), ("text",), ("text", "image"), ("audio",), (), ("text",))


def sample(*modalities: str) -> dict[str, Tensor]:
    """What a data set returns: only what there is."""
    everything = {
        "text": torch.randint(100, (7,)),
        "image": torch.randn(3, 8, 8),
        "audio": torch.randn(20),
    }
    return {name: everything[name] for name in modalities}


def one_by_one(samples: list[dict[str, Tensor]], weighted: bool) -> Tensor:
    """The same without batches: logits [N, CLASSES]."""
    rows = []
    for parts in samples:
        logits = [ENCODERS[name](part.unsqueeze(0))[0] for name, part in parts.items()]
        weights = [0.1 * x.logsumexp(0) if weighted else 1.0 for x in logits]
        rows.append(
            sum((w * x for w, x in zip(weights, logits, strict=True)), torch.zeros(CLASSES))
        )
    return torch.stack(rows)


def report(rows_run: dict[str, int], output: Tensor, expected: Tensor) -> None:
    ran = ", ".join(f"{name} {count}" for name, count in rows_run.items())
    gap = (output - expected).abs().max().item()
    print(f"  rows of {len(output)}: {ran}; off from one by one: {gap:.0e}")


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    samples = [sample(*modalities) for modalities in SAMPLES]
    inputs, present = collate_modalities(samples, [*ENCODERS])
    rows_run: dict[str, int] = {}
    for name, encoder in ENCODERS.items():
        encoder.register_forward_pre_hook(
            lambda _, arguments, name=name: rows_run.update({name: len(arguments[0])})
        )

    print("EnergyFusion, each modality weighted by its confidence:")
    fused = EnergyFusion(ENCODERS).eval()(inputs, present=present)
    report(dict(rows_run), fused, one_by_one(samples, weighted=True))

    print("RoutedFusion, the modalities that are there, summed:")
    branches = {name: Branch(encoder, inputs=[name]) for name, encoder in ENCODERS.items()}
    fusion = RoutedFusion(None, branches).eval()
    mask = torch.stack([present[name] for name in ENCODERS], 1)
    summed, routing = fusion(inputs, choice=mask, return_routing=True)
    report(
        dict(zip(ENCODERS, routing.rows_run, strict=True)),
        summed,
        one_by_one(samples, weighted=False),
    )


if __name__ == "__main__":
    main()
