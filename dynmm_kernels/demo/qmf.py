"""QMF on handwritten digits: what weighting modalities by quality gives, and what it costs.

The thumbnail and the full image of every digit are two modalities with an encoder each. Late
fusion averages their logits; QMF weights them by energy, without and with its ranking loss; both
run every encoder on every digit. A cascade of QMF's encoders asks for the full image only where the
thumbnail leaves a doubt, with thresholds calibrated on digits held out; DynMM's gate decides from
the thumbnail. All are tested on clean digits and by QMF's protocol, in which each modality is noisy
in half of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.noise import corrupt
from ..measure.timing import Effort, interleave
from ..nn import CascadeFusion, EnergyFusion, QualityHistory, RoutedFusion, quality_rank_loss
from .digits import (
    BRANCHES,
    FEATURES,
    RATES,
    TRAIN_BATCH,
    Digits,
    Views,
    convolutions,
    jitter,
    load_digits,
    one_thread,
    part,
    perceptron,
    views,
)
from .digits import build as build_gated
from .digits import train as train_gated
from .qmf_report import NOISES, Report, Row

EPOCHS, SEEDS = 20, 2
RANK_WEIGHT = 0.1  # of the ranking loss, as for NYU Depth V2
LATE = {  # method: weights, and the weight of the ranking loss
    "late fusion": ("uniform", 0.0),
    "QMF, no ranking loss": ("energy", 0.0),
    "QMF": ("energy", RANK_WEIGHT),
}
TARGET, DELTA = 0.05, 0.1  # of the calibration
DRAWS = 3  # of the noise
TEST_BATCH = 128
TIMING_SECONDS = 15.0

Run = Callable[[Views], tuple[Tensor, float]]  # -> logits, MMACs per sample that were executed


def build(sample: Views) -> EnergyFusion:
    full = nn.Sequential(convolutions(), nn.Linear(FEATURES, 10))
    encoders = {"low": part(perceptron(256, 10), sample, "low"), "full": part(full, sample, "full")}
    return EnergyFusion(encoders)


def train(
    fusion: EnergyFusion,
    digits: Digits,
    epochs: int,
    rank_weight: float,
    generator: torch.Generator,
) -> None:
    """QMF's losses: the cross entropy of every encoder and of the fusion, and the ranking loss."""
    fusion.train()
    history = QualityHistory(len(digits.train_labels), len(fusion.encoders))
    groups = [{"params": encoder.parameters()} for encoder in fusion.encoders]
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * -(-len(digits.train_labels) // TRAIN_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATES[BRANCHES][1:], total_steps=steps
    )
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for rows in order.split(TRAIN_BATCH):
            batch = views(jitter(digits.train_images[rows], generator))
            fused = fusion(batch, targets=digits.train_labels[rows])
            history.update(rows, fused.losses[:, :-1].detach())
            loss = fused.losses.mean(0).sum()
            if rank_weight:
                ranks = quality_rank_loss(fused.confidence, rows, history)
                loss = loss + rank_weight * ranks.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    fusion.eval()


def train_all(
    digits: Digits, epochs: int, seed: int, advance: Callable[[str], None]
) -> tuple[dict[str, Run], str]:
    """Every method, trained on the same digits from the same start; what calibration guarantees."""
    sample = views(digits.test_images[:8])
    start = build(sample)
    runs: dict[str, Run] = {}
    for method, (weights, rank_weight) in LATE.items():
        fusion = copy.deepcopy(start)
        fusion.weights = weights
        train(fusion, digits, epochs, rank_weight, torch.Generator().manual_seed(seed))
        runs[method] = partial(_run_fusion, fusion)
        advance(f"training {method}")
    gated = build_gated(sample)
    train_gated(gated, digits, epochs, torch.Generator().manual_seed(seed), lambda text: None)
    runs["DynMM gate"] = partial(_run_routed, gated)
    advance("training DynMM gate")

    cascade = CascadeFusion([*fusion.encoders]).eval()
    held_out, _ = _halves(digits)
    images, labels = held_out
    calibration = cascade.calibrate(
        [((views(images),), labels)], risk="gap", target=TARGET, delta=DELTA
    )
    runs["QMF cascade, calibrated"] = partial(_run_routed, cascade)
    return runs, calibration.guarantee


def experiment(
    epochs: int = EPOCHS,
    seed: int = 0,
    seeds: int = SEEDS,
    rounds: int = 9,
    advance: Callable[[str], None] = lambda text: None,
) -> Report:
    """Trains every method with every seed, tests them clean and noisy, times them in turns."""
    found: list[dict[str, Row]] = []
    for number in range(seed, seed + seeds):
        digits = load_digits(number)
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(number)
            runs, guarantee = train_all(digits, epochs, number, advance)
        images, labels = _halves(digits)[1]
        batches = [views(rows) for rows in images.split(TEST_BATCH)]
        with torch.inference_mode():
            seconds = interleave(
                {method: partial(_run_all, run, batches) for method, run in runs.items()},
                Effort(TIMING_SECONDS, (1, rounds), sample=0.0),
                after_round=lambda: advance("timing"),
            )
            found.append(
                {
                    method: _row(method, run, images, labels, 1e3 * median(seconds[method]))
                    for method, run in runs.items()
                }
            )
    rows = tuple(_mean([rows[method] for rows in found]) for method in runs)
    threads = torch.get_num_threads()
    return Report(rows, guarantee, len(labels), TEST_BATCH, epochs, seeds, threads)


def _halves(digits: Digits) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels to calibrate on, and to test on."""
    images, labels = digits.test_images.chunk(2), digits.test_labels.chunk(2)
    return (images[0], labels[0]), (images[1], labels[1])


def _run_fusion(fusion: EnergyFusion, batch: Views) -> tuple[Tensor, float]:
    return fusion(batch), sum(part.cost for part in fusion.encoders.all())


def _run_routed(fusion: RoutedFusion | CascadeFusion, batch: Views) -> tuple[Tensor, float]:
    logits, routing = fusion(batch, return_routing=True)
    return logits, routing.executed_cost


def _run_all(run: Run, batches: list[Views]) -> tuple[Tensor, float]:
    """The logits, and MMACs per sample."""
    results = [run(batch) for batch in batches]
    logits = torch.cat([logits for logits, _ in results])
    return logits, sum(len(rows) * macs for rows, macs in results) / len(logits)


def _row(method: str, run: Run, images: Tensor, labels: Tensor, time_ms: float) -> Row:
    accuracy: dict[str, float] = {}
    clean = views(images)
    macs = 0.0
    for noise, (kind, epsilon) in NOISES.items():
        hits = []
        for draw in range(DRAWS):
            noisy, _ = corrupt(
                [*clean.values()],
                kind,
                epsilon=epsilon,
                unit=2 / 255,
                black=-1.0,
                clip=True,
                generator=torch.Generator().manual_seed(draw),
            )
            batches = [dict(zip(clean, rows, strict=True)) for rows in _split(noisy)]
            logits, spent = _run_all(run, batches)
            macs = spent if noise == "clean" else macs
            hits.append(100 * float((logits.argmax(1) == labels).float().mean()))
        accuracy[noise] = fmean(hits)
    return Row(method, accuracy, macs, time_ms)


def _split(tensors: tuple[Tensor, ...]) -> Any:
    return zip(*(tensor.split(TEST_BATCH) for tensor in tensors), strict=True)


def _mean(rows: list[Row]) -> Row:
    accuracy = {noise: fmean(row.accuracy[noise] for row in rows) for noise in NOISES}
    macs, time_ms = (fmean(getattr(row, name) for row in rows) for name in ("macs", "time_ms"))
    return Row(rows[0].method, accuracy, macs, time_ms)
