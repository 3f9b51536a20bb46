"""A bar for what takes a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
