"""Why a batch ran as it did, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .cell import ROUTED
from .chooser import Chooser, Estimate


@dataclass(frozen=True)
class Explanation:
    """How `execution="auto"` ran a batch.

    Attributes:
        way: "routed" or "masked"; None where there was no choice.
        why: the reason, a sentence.
        device, recorded: of the batch; recorded is "forward" or how the gate learns.
        rows: N.
        counts: samples by the name of the branch, or of the depth; empty where the choice was made
            before they were known.
        estimates: of both ways, the seconds measured (a median), from how many calls, and the
            seconds predicted.
        parts: of each branch, routed, the predicted seconds at all and per row.
    """

    way: str | None
    why: str
    device: str = ""
    recorded: str = ""
    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, chooser: Chooser, names: Sequence[str]) -> Explanation:
        """Of the last call."""
        last = chooser.last
        if last is None or isinstance(last, str):
            return cls(None, last or "nothing was run")
        kind, rows, counts = last
        way, estimates = chooser.explain(kind, rows, counts)
        parts = chooser.parts(kind, len(counts))
        return cls(
            way,
            _reason(way, estimates),
            *kind,
            rows,
            dict(zip(names, counts, strict=False)),
            estimates,
            dict(zip(names, parts, strict=True)) if parts else {},
        )

    def __str__(self) -> str:
        if self.way is None:
            return f"auto had no choice: {self.why}"
        lines = [f"{self.way}: {self.why}", f"{self.recorded} on {self.device}, N={self.rows}"]
        for way, known in self.estimates.items():
            measured = f"measured {_time(known.measured)} ({known.calls} calls)"
            lines.append(f"  {way:8}{measured}, predicted {_time(known.predicted)}")
        for name, count in self.counts.items():
            line = f"  {name}: {count} rows"
            if name in self.parts:
                fixed, slope = self.parts[name]
                line += f", routed {_time(fixed)} and {_time(slope)} per row"
            lines.append(line)
        return "\n".join(lines)


def _reason(way: str, estimates: dict[str, Estimate]) -> str:
    seconds = {name: known.measured or known.predicted for name, known in estimates.items()}
    if None in seconds.values():
        return "nothing speaks against it yet" if way == ROUTED else "as it was before"
    own = seconds.pop(way)
    (other, its), *_ = seconds.items()
    assert own is not None
    assert its is not None
    known = "measured" if all(e.measured for e in estimates.values()) else "predicted"
    return f"{other} takes {its / own:.2f} times as long ({known})"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "nothing"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
