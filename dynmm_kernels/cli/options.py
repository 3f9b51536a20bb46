"""What several commands take, and how they say that it does not fit."""

from __future__ import annotations

import argparse


class Mistake(Exception):
    """Of the user: a command ends with code 2 and this one line."""


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def seconds(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0; got {text}")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be in 0..1; got {text}")
    return number


def shares(text: str) -> tuple[float, ...]:
    return tuple(share(part) for part in text.split(","))


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def add_timing(parser: argparse.ArgumentParser, rounds: int, seconds_: float, of: str) -> None:
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help=f"at most; default {rounds}"
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=seconds_,
        help=f"{of}, about; then fewer rounds, but at least 3; default {seconds_:g}",
    )
    parser.add_argument("--threads", type=positive, help="of torch; default: as torch has it")


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds else "0"
