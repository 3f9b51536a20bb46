"""Which part of a fusion an exception came from."""

from __future__ import annotations

import contextlib


def note_origin(error: BaseException, label: str) -> None:
    """Adds "in `label`" to the notes of `error`, which keeps its type, arguments and fields.

    Python 3.10 keeps notes, but does not print them.
    """
    note = f"in {label}"
    notes = getattr(error, "__notes__", [])
    with contextlib.suppress(Exception):  # an exception that cannot be changed is raised as it is
        if note not in notes:
            error.__notes__ = [*notes, note]  # type: ignore[attr-defined]
