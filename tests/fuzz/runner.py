"""Runs cases, counts what they covered, makes a failing one smaller, and tells how to repeat it."""

import contextlib
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import dynmm_kernels

from .compare import Refused, Skip
from .draw import Draw

RARELY = {"raw": 20}  # a case in a process of its own: one in so many


@dataclass
class Failure:
    """A case that failed, and the features that must be drawn for it to fail."""

    part: str
    seed: int
    error: BaseException
    keep: list[str]
    features: dict[str, object]

    def draw(self) -> Draw:
        """The case once more."""
        return Draw(self.seed, self.keep)

    def __str__(self) -> str:
        names = ",".join(name.replace(" ", "_") for name in self.keep)
        case = f"--only {self.part} --seed {self.seed} --cases 1 --keep {names or 'none'}"
        return "\n".join(
            (
                f"{self.part}, seed {self.seed}: {headline(self.error)}",
                f"    with {self.features}",
                f"  repeat by  python -m tests.fuzz {case}",
            )
        )


def headline(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


@dataclass
class Tally:
    """Counts over the cases of one part."""

    cases: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    values: dict[str, Counter[object]] = field(default_factory=dict)
    pairs: set[tuple[object, ...]] = field(default_factory=set)

    def note(self, draw: Draw, outcome: str) -> None:
        self.cases += 1
        self.outcomes[outcome] += 1
        for name, value in draw.features.items():
            self.values.setdefault(name, Counter())[value] += 1
        self.pairs.update(combinations(draw.features.items(), 2))

    def possible_pairs(self) -> int:
        sizes = [len(values) for values in self.values.values()]
        return sum(a * b for a, b in combinations(sizes, 2))


def attempt(case: Callable[[Draw], None], draw: Draw) -> BaseException | None:
    """None where the case passed; `Skip` and `Refused` are told apart by the caller."""
    on_reference = draw.pick("backend", {"default": 9, "reference": 1}) == "reference"
    try:
        with dynmm_kernels.backend("reference") if on_reference else contextlib.nullcontext():
            case(draw)
    except Exception as error:
        return error
    return None


def smaller(part: str, case: Callable[[Draw], None], seed: int, error: BaseException) -> Failure:
    """Makes one feature after the other plain, as long as the same kind of failure remains."""
    draw = Draw(seed)
    attempt(case, draw)
    keep = list(draw.features)
    for name in list(keep):
        fewer = [other for other in keep if other != name]
        other = attempt(case, Draw(seed, fewer))
        if other is not None and kind(other) == kind(error):
            keep, error = fewer, other
    final = Draw(seed, keep)
    attempt(case, final)
    return Failure(part, seed, error, keep, {name: final.features.get(name) for name in keep})


def kind(error: BaseException) -> str:
    words = headline(error).replace(",", " ").replace(":", " ").split()
    return " ".join(word for word in words if word.isalpha())[:80]


class Runner:
    """One part after the other, a case each, until the time or the number of cases is up."""

    def __init__(self, parts: dict[str, Callable[[Draw], None]], stop_at: int = 1) -> None:
        self.parts, self.stop_at = parts, stop_at
        self.tallies = {part: Tally() for part in parts}
        self.failures: list[Failure] = []
        self.kinds: set[tuple[str, str]] = set()

    def run(
        self, seed: int, cases: int | None, seconds: float, keep: Sequence[str] | None = None
    ) -> None:
        end = time.monotonic() + seconds
        index = 0
        while (cases is None or index < cases) and time.monotonic() < end:
            for part in self.parts:
                if index % RARELY.get(part, 1):
                    continue
                self.one(part, seed + index, keep)
                if len(self.failures) >= self.stop_at:
                    return
            index += 1

    def one(self, part: str, seed: int, keep: Sequence[str] | None) -> None:
        case, tally = self.parts[part], self.tallies[part]
        start = time.process_time()
        draw = Draw(seed, keep)
        error = attempt(case, draw)
        tally.seconds += time.process_time() - start
        if error is None or isinstance(error, (Skip, Refused)):
            outcome = "agreed" if error is None else type(error).__name__.lower()
            tally.note(draw, {"skip": "skipped"}.get(outcome, outcome))
            return
        tally.note(draw, "failed")
        if (part, kind(error)) in self.kinds:
            return
        self.kinds.add((part, kind(error)))
        failure = (
            smaller(part, case, seed, error)
            if keep is None
            else Failure(part, seed, error, list(keep), draw.features)
        )
        self.failures.append(failure)
        print(f"\nMISMATCH {failure}", flush=True)
        traceback.print_exception(failure.error, limit=-4)

    def report(self, features: bool = True) -> None:
        for part, tally in self.tallies.items():
            if not tally.cases:
                continue
            outcomes = ", ".join(f"{n} {name}" for name, n in sorted(tally.outcomes.items()))
            print(
                f"{part}: {tally.cases} cases in {tally.seconds:.1f} s of CPU"
                f" ({tally.cases / tally.seconds:.0f} cases/s): {outcomes};"
                f" {len(tally.pairs)} of at most {tally.possible_pairs()} pairs of features"
            )
            for name, values in tally.values.items() if features else ():
                print(f"    {name}: " + ", ".join(f"{v} {n}" for v, n in values.most_common()))
        cases = sum(tally.cases for tally in self.tallies.values())
        seconds = sum(tally.seconds for tally in self.tallies.values())
        rate = cases / seconds if seconds else 0.0
        failed = sum(tally.outcomes["failed"] for tally in self.tallies.values())
        kinds = f" of {len(self.failures)} kinds" if failed else ""
        print(f"{cases} cases, {failed} mismatches{kinds}, {rate:.0f} cases/s")
