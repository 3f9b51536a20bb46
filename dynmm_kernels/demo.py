"""The whole idea on handwritten digits, in under a minute on two CPU cores.

Every 8x8 digit of scikit-learn is seen twice: as a 4x4 thumbnail and in full. Branch E1 is a small
network that reads only the thumbnail; branch E2 is a convolutional network that fuses both views
and costs twenty times as much. A gate looks at the thumbnail and decides which of the two a digit
deserves. It learns to be thrifty, because what it spends is part of the loss. The held-out half is
then classified by the same trained model dense, masked and routed; masked and routed must agree,
what differs is the time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .costs import branch_costs
from .demo_report import Report, Row, draw, table
from .nn import Branch, RoutedFusion, resource_loss

E1, E2 = 0, 1
TRAIN_BATCH, TEST_BATCH = 64, 128
EPOCHS, SWEEP_EPOCHS = 25, 10
TIMING_SECONDS = 20.0
COST_WEIGHT = 0.07  # of the resource loss; larger sends more digits to E1
BRANCHES, TOGETHER = "branches", "gate and branches"
RATES = {  # stage: peak learning rates of gate, E1, E2
    BRANCHES: [0.0, 1e-2, 3e-3],
    TOGETHER: [5e-3, 3e-4, 3e-4],
}

Views = dict[str, Tensor]


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] in -1..1 and labels [N], halved into training and test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Digits:
    """Read the digits that ship inside scikit-learn: nothing is downloaded."""
    try:
        data = importlib.import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise SystemExit(f"the demo needs scikit-learn ({error}): pip install '.[demo]'") from None
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order.chunk(2)
    return Digits(images[train], labels[train], images[test], labels[test])


def views(images: Tensor) -> Views:
    """The two modalities: a 4x4 thumbnail and the full image."""
    return {"low": F.avg_pool2d(images, 2), "full": images}


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift every image a little.

    Without it both branches know the training digits by heart, and a gate that never meets a
    mistake learns nothing.
    """
    turn, scale, right, down = (torch.rand(4, len(images), generator=generator) - 0.5) * 0.16
    cos, sin = torch.cos(turn) + scale, torch.sin(turn)
    matrix = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def perceptron(hidden: int, outputs: int) -> nn.Sequential:
    """A network over the thumbnail alone."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(16, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


class FusedNet(nn.Module):
    """The costly branch: convolutions over the enlarged image, fused with the thumbnail."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Upsample(scale_factor=2, mode="bilinear")]
        for before, after in ((1, width), (width, 2 * width)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.full = nn.Sequential(*layers, nn.Flatten())
        self.low = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU())
        self.head = nn.Linear(2 * width * 16 + 32, 10)

    def forward(self, low: Tensor, full: Tensor) -> Tensor:
        return self.head(torch.cat([self.full(full), self.low(low)], dim=1))


def build(sample: Views) -> RoutedFusion:
    """The model; every part knows its cost in millions of MACs per sample."""
    gate, easy, hard = perceptron(256, 2), perceptron(256, 10), FusedNet()

    def part(module: nn.Module, *inputs: str) -> Branch:
        macs = branch_costs(module, tuple(sample[name] for name in inputs))
        return Branch(module, inputs=inputs, cost=macs / 1e6)

    branches = {"E1": part(easy, "low"), "E2": part(hard, "low", "full")}
    return RoutedFusion(part(gate, "low"), branches, execution="routed")


def train(
    fusion: RoutedFusion,
    digits: Digits,
    epochs: int,
    generator: torch.Generator,
    advance: Callable[[str], None],
    stages: Sequence[str] = tuple(RATES),
    cost_weight: float = COST_WEIGHT,
) -> None:
    """DynMM's two stages: first the branches, each on every sample; then the gate with them.

    In the second stage the gate decides hard, and the straight-through gradient tells it what the
    other choice would have been worth.
    """
    steps = epochs * -(-len(digits.train_labels) // TRAIN_BATCH)
    fusion.train()
    gate, easy, hard = fusion.gate, *fusion.branches
    for stage in stages:
        groups = [{"params": part.parameters()} for part in (gate, easy, hard)]
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATES[stage], total_steps=steps)
        for _ in range(epochs):
            order = torch.randperm(len(digits.train_labels), generator=generator)
            for rows in order.split(TRAIN_BATCH):
                batch = views(jitter(digits.train_images[rows], generator))
                labels = digits.train_labels[rows]
                if stage == BRANCHES:
                    loss = F.cross_entropy(fusion(batch, choice=E1), labels)
                    loss = loss + F.cross_entropy(fusion(batch, choice=E2), labels)
                else:
                    logits, routing = fusion(batch, return_routing=True)
                    loss = F.cross_entropy(logits, labels) + cost_weight * resource_loss(routing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            advance(f"training {stage}")
    fusion.eval()


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
        seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        for mode in modes:
            self.run(mode)
        begin = time.perf_counter()
        for _ in range(rounds):
            if time.perf_counter() - begin > TIMING_SECONDS:
                break  # the machine is busy; the first round always happens
            for mode in modes:
                start = time.perf_counter()
                self.run(mode)
                seconds[mode].append(time.perf_counter() - start)
            advance("timing")
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
    rounds: int = 15,
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, so that a seed gives the same model on any number of cores.

    Batches this small gain little from threads, and lose much where the cores are shared.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal where rich is installed, else a line whenever the activity changes."""
    if quiet:
        yield lambda text: None
        return
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        Progress = None  # type: ignore[misc,assignment]
    if Progress is None or not sys.stdout.isatty():
        seen: set[str] = set()

        def announce(text: str) -> None:
            if text not in seen:
                seen.add(text)
                print(f"{text} ...", flush=True)

        yield announce
        return
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs", type=positive, help=f"of each stage; {EPOCHS}, or {SWEEP_EPOCHS} in the sweep"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=positive, default=15, help="of the timing")
    parser.add_argument("--figure", type=Path, default=Path("dynmm_demo.png"), metavar="PATH")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="train with several weights of the cost, masked and routed (a few minutes)",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.sweep:
        return importlib.import_module(f"{__package__}.demo_sweep").run(arguments)
    epochs = arguments.epochs or EPOCHS
    total = len(RATES) * epochs + arguments.rounds
    with progress(total, quiet=arguments.json) as advance:
        report, _ = experiment(epochs, arguments.seed, arguments.rounds, advance)
    drawn = draw(report, arguments.figure)
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
        return 0
    print(table(report))
    print(f"figure: {arguments.figure}" if drawn else "no figure: matplotlib is not installed")
    return 0
