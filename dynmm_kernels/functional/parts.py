"""What of a pack of tensors each branch selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import tree

Key = str | int
Selection = Sequence[Key | Sequence[Key]]


def split_parts(
    pack: Any, select: Any, num_branches: int
) -> tuple[list[Any], list[tuple[list[int], tree.Spec]]]:
    """The leaves of `pack`, and for each branch the places and the structure of those it selects.

    Raises:
        ValueError, TypeError: a pack or a selection that is none, or a part that is not there.
    """
    if not isinstance(pack, (list, tuple, Mapping)):
        raise TypeError(
            "gather: with select, tensors must be a list, a tuple or a dict of parts; got "
            f"{type(pack).__name__}"
        )
    if isinstance(select, str) or not isinstance(select, Sequence):
        raise TypeError(
            "gather: select must be a sequence with a selection for each branch; got "
            f"{type(select).__name__}"
        )
    if len(select) != num_branches:
        raise ValueError(
            f"gather: select must have one selection per branch, {num_branches}; got {len(select)}"
        )
    leaves, spec = tree.flatten(pack)
    parts = tree.unflatten([*range(len(leaves))], spec)
    return leaves, [tree.flatten(_parts(parts, own, b)) for b, own in enumerate(select)]


def _parts(pack: Any, own: Key | Sequence[Key], branch: int) -> Any:
    """One part for a bare key; else as many as there are keys, in a container like the pack."""
    if isinstance(own, (str, int)):
        return _part(pack, own, branch)
    if isinstance(pack, Mapping):
        return {key: _part(pack, key, branch) for key in own}
    parts = [_part(pack, key, branch) for key in own]
    return tuple(parts) if isinstance(pack, tuple) else parts


def _part(pack: Any, key: Key, branch: int) -> Any:
    if isinstance(pack, Mapping):
        if key in pack:
            return pack[key]
        there = ", ".join(map(repr, pack))
    else:
        if isinstance(key, int) and -len(pack) <= key < len(pack):
            return pack[key]
        there = f"{len(pack)} tensors"
    raise ValueError(f"gather: branch {branch} selects {key!r}; there are {there}")
