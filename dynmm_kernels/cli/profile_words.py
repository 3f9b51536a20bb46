"""What `profile` found, as tables and in words, and for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..measure.forecast import Curve
from ..measure.profiling import Profile
from .options import duration

FAR = 64  # batches up to that many times the own one are looked at
BUSY = 0.1  # rounds that differ by more say that others use the machine
CLEAR = 1.1  # a gain that does not depend on the day


def text(about: Mapping[str, Any], profiles: Sequence[Profile]) -> str:
    """The report, readable without colour."""
    first = profiles[0]
    where = f"{about['device']}, {about['threads']} threads, torch {about['torch']}"
    origin = "as the gate decides" if first.decided else "as given"
    head = [
        f"{about['factory']}: {about['fusion'] or 'the model'}, a RoutedFusion; {where}",
        f"batch {first.batch}; shares {origin}: {_shares(first.branches, first.shares)}",
    ]
    return "\n\n".join(["\n".join(head), *(_section(p) for p in profiles)])


def _section(profile: Profile) -> str:
    gradient = profile.learns or "none"
    title = f"TRAINING, forward and backward, gate_grad {gradient}" if profile.training else "EVAL"
    return "\n\n".join(
        [
            f"{title} ({profile.rounds} rounds)",
            _parts(profile),
            _checks(profile),
            "\n".join(words(profile)),
        ]
    )


def _parts(profile: Profile) -> str:
    width = max(18, *(len(name) for name, *_ in rows_of(profile)))
    lines = [f"{'part':{width}}{'rows':>7}{'time':>11}{'fixed':>11}{'per row':>11}"]
    for name, rows, curve in rows_of(profile):
        line = f"{name:{width}}{rows:7.0f}{duration(curve(rows)):>11}"
        if name not in ("routing itself", "(masked: blending)"):
            line += f"{duration(curve.line.fixed):>11}{duration(curve.line.slope):>11}"
            if not curve.is_straight:
                line += f"  not linear: off by {100 * curve.line.deviation:.0f} %"
        lines.append(line)
    shown = [f"{name} {duration(t)}" for name, t in profile.phases.items()]
    lines += ["", f"under a profiler, which costs time, too: {', '.join(shown)}"]
    lines.append(f"the host waits for the device {_times(profile.waits)} per call")
    return "\n".join(lines)


def rows_of(profile: Profile) -> list[tuple[str, float, Curve]]:
    """The parts of a routed call, in order: name, rows, and time by rows; blending at the end."""
    forecast, size = profile.forecast, profile.batch
    rows = [("gate", float(size), forecast.gate)]
    for (name, curve), share in zip(forecast.branches.items(), profile.shares, strict=True):
        own = size if name in forecast.coupled else share * size
        rows.append((f"branch {name}", own, curve))
        if name in forecast.rest:
            rows.append((f"  {name}, forward only", size - own, forecast.rest[name]))
    rows.append(("routing itself", size, forecast.routing))
    rows.append(("(masked: blending)", size, forecast.blend))
    return rows


def _times(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count} times")


def _checks(profile: Profile) -> str:
    lines = [f"{'':10}{'shares':30}{'measured':>10}{'rounds':>9}{'predicted':>11}{'off by':>9}"]
    for check in profile.checks:
        shares = _shares(profile.branches, check.shares) if check.execution == "routed" else ""
        lines.append(
            f"{check.execution:10}{shares:30}{duration(check.measured):>10}"
            f"{f'+-{100 * check.spread:.0f}%':>9}{duration(check.predicted):>11}"
            f"{100 * check.error:+8.1f}%"
        )
    if max(check.spread for check in profile.checks) > BUSY:
        lines.append("This machine is busy: give it more --seconds, or measure when it is not.")
    return "\n".join(lines)


def words(profile: Profile) -> list[str]:
    """The answer, in sentences."""
    routed, _, masked = profile.checks
    shares = _shares(profile.branches, profile.shares)
    mode = "In training" if profile.training else "In eval"
    gain = masked.measured / routed.measured
    gained = f"is {gain:.2f} times as fast" if gain >= 1 else f"takes {1 / gain:.2f} times as long"
    return [
        f"{mode} routing pays, for {shares}, {_from_batch(profile)};",
        f"and in a batch of {profile.batch} {_below_share(profile)}.",
        f"For your batch of {profile.batch} with {shares} routed takes "
        f"{duration(routed.measured)}, masked {duration(masked.measured)}; predicted "
        f"{duration(routed.predicted)} and {duration(masked.predicted)}.",
        f"Routed {gained}: take {advice(profile)}",
    ]


def advice(profile: Profile) -> str:
    """Which execution to take."""
    routed, _, masked = profile.checks
    gain = masked.measured / routed.measured
    if gain >= CLEAR:
        return 'execution="routed", or leave it at "auto", which finds it by itself.'
    if gain <= 1 / CLEAR:
        return 'execution="masked", or leave it at "auto", which finds it by itself.'
    return 'execution="auto", for which of them is faster changes from batch to batch.'


def _from_batch(profile: Profile) -> str:
    most = FAR * profile.batch
    batch = profile.forecast.even_batch(profile.shares, most)
    if batch is None and profile.forecast.speedup(profile.batch, profile.shares) > 1:
        return f"at batch {profile.batch}, but not at all that are larger"
    if batch is None:
        return f"at no batch up to {most}"
    guessed = " (extrapolated)" if batch > profile.batch else ""
    return "at every batch" if batch == 1 else f"from batch {batch} on{guessed}"


def _below_share(profile: Profile) -> str:
    forecast = profile.forecast
    share = forecast.even_share(profile.batch, profile.shares, profile.several)
    costly = profile.branches[forecast.costly]
    if share is None:
        return f"at no active share of {costly}"
    if share >= 1:
        return f"at every active share of {costly}"
    return f"while fewer than {100 * share:.0f} % of the samples need {costly}"


def _shares(names: Sequence[str], shares: Sequence[float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in zip(names, shares, strict=True))


def facts(profile: Profile) -> dict[str, Any]:
    """For JSON: times in ms, per row in us."""
    forecast = profile.forecast
    parts = [
        {
            "part": name.strip(" ()"),
            "rows": rows,
            "ms": 1e3 * curve(rows),
            "fixed_ms": 1e3 * curve.line.fixed,
            "per_row_us": 1e6 * curve.line.slope,
            "linear": curve.is_straight,
            "points": [[n, 1e3 * seconds] for n, seconds in curve.points],
        }
        for name, rows, curve in rows_of(profile)
    ]
    checks = [
        {
            "execution": check.execution,
            "shares": check.shares,
            "measured_ms": 1e3 * check.measured,
            "predicted_ms": 1e3 * check.predicted,
            "error": check.error,
            "spread": check.spread,
        }
        for check in profile.checks
    ]
    return {
        "kind": "training" if profile.training else "forward",
        "batch": profile.batch,
        "branches": profile.branches,
        "shares": profile.shares,
        "gate_decided": profile.decided,
        "gate_grad": profile.learns,
        "rounds": profile.rounds,
        "waits": profile.waits,
        "profiled_ms": {name: 1e3 * t for name, t in profile.phases.items()},
        "parts": parts,
        "checks": checks,
        "costly": profile.branches[forecast.costly],
        "pays_from_batch": forecast.even_batch(profile.shares, FAR * profile.batch),
        "pays_below_share": forecast.even_share(profile.batch, profile.shares, profile.several),
        "speedup_by_share": forecast.by_share(profile.batch, profile.shares, profile.several),
        "words": " ".join(words(profile)),
    }
