"""The demo's one experiment: train, check, and run the same model in every mode."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..measure.timing import Effort, interleave
from ..nn import RoutedFusion
from .digits import E1, E2, Digits, build, load_digits, one_thread, train, views
from .report import Report, Row

EPOCHS = 25
TEST_BATCH = 128
ROUNDS = 15
TIMING_SECONDS = 20.0  # where the machine is busy, fewer rounds


class Bench:
    """The trained model on the test set, run in any mode."""

    MODES = ("static E1", "static E2", "dense", "masked", "routed")

    def __init__(self, fusion: RoutedFusion, digits: Digits) -> None:
        self.fusion = fusion
        self.labels = digits.test_labels
        self.batches = [views(images) for images in digits.test_images.split(TEST_BATCH)]

    def run(self, mode: str) -> list[tuple[Tensor, Any]]:
        """(logits, routing) of every batch."""
        static = mode.startswith("static")
        self.fusion.execution = "routed" if static else mode
        choice = (E1 if mode.endswith("E1") else E2) if static else None
        with torch.inference_mode():
            return [self.fusion(b, choice=choice, return_routing=True) for b in self.batches]

    def logits(self, mode: str) -> Tensor:
        return torch.cat([logits for logits, _ in self.run(mode)])

    def parity(self) -> float:
        """How far routed is from masked, relative to the largest logit."""
        masked, routed = self.logits("masked"), self.logits("routed")
        return float((masked - routed).abs().max() / masked.abs().max())

    def times(
        self, rounds: int, advance: Callable[[str], None], modes: Sequence[str] = MODES
    ) -> dict[str, float]:
        """Median milliseconds of each mode, taken in turns so that a noisy moment hits them all."""
        seconds = interleave(
            {mode: partial(self.run, mode) for mode in modes},
            Effort(TIMING_SECONDS, (1, rounds), sample=0.0),
            after_round=lambda: advance("timing"),
        )
        return {mode: 1e3 * median(values) for mode, values in seconds.items()}

    def work(self, mode: str) -> tuple[tuple[float, ...], float]:
        """The share of each branch, and the MMACs per sample that were really executed."""
        shares, executed = torch.zeros(2), 0.0
        for logits, routing in self.run(mode):
            shares += routing.weights.sum(0)
            executed += len(logits) * routing.executed_cost
        total = len(self.labels)
        return tuple((shares / total).tolist()), executed / total

    def row(self, mode: str, times: dict[str, float]) -> Row:
        """What `mode` gives and costs; `times` holds it and "masked"."""
        shares, macs = self.work(mode)
        return Row(
            mode=mode,
            accuracy=100 * float((self.logits(mode).argmax(1) == self.labels).float().mean()),
            shares=shares,
            macs=macs,
            time_ms=times[mode],
            speedup=times["masked"] / times[mode],
            ceiling=self.work("masked")[1] / macs,
        )


def experiment(
    epochs: int = EPOCHS,
    seed: int = 0,
    rounds: int = ROUNDS,
    advance: Callable[[str], None] = lambda text: None,
) -> tuple[Report, Bench]:
    """Train, check that routed equals masked, and only then time."""
    digits = load_digits(seed)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        fusion = build(views(digits.test_images[:8]))
        start = time.perf_counter()
        train(fusion, digits, epochs, torch.Generator().manual_seed(seed), advance)
        train_seconds = time.perf_counter() - start
    bench = Bench(fusion, digits)
    parity = bench.parity()
    if not parity < 1e-5:
        raise RuntimeError(f"routed and masked logits differ by {parity:.1e} of the largest logit")
    times = bench.times(rounds, advance)
    rows = tuple(bench.row(mode, times) for mode in bench.MODES)
    threads = torch.get_num_threads()
    samples = len(digits.test_labels)
    return Report(rows, parity, samples, TEST_BATCH, train_seconds, epochs, seed, threads), bench
