"""Batches of samples that do not all have the same modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate


class Collated(NamedTuple):
    """What `collate_modalities` returns.

    Attributes:
        inputs: by modality, a batch of N samples as torch's `default_collate` makes it, with zeros
            for the samples that lack it; None where all do.
        present: by modality, bool [N]: which samples have it.
    """

    inputs: dict[str, Any]
    present: dict[str, Tensor]


def collate_modalities(
    samples: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None
) -> Collated:
    """A batch out of samples with differing modalities, and who has what.

        inputs, present = collate_modalities(samples, ["text", "image"])
        fusion(inputs, present=present)                             # EnergyFusion
        mask = torch.stack([present["text"], present["image"]], 1)
        fusion(inputs, choice=mask)                                 # RoutedFusion

    Args:
        samples: one dict per sample; a modality that it lacks is left out or None. What samples
            have of one modality must be of one shape: pad or crop before.
        names: the modalities to collate; default: all there are, in the order in which they appear.
            To collate labels and the like, call torch's `default_collate` on them.

    Raises:
        ValueError: no samples, or a name that no sample has; what `default_collate` says of one
            modality, which the message names.
    """
    if not samples:
        raise ValueError("collate_modalities: wanted at least one sample; got none")
    known = [*dict.fromkeys(name for sample in samples for name in sample)]
    names = known if names is None else [*names]
    inputs: dict[str, Any] = {}
    present: dict[str, Tensor] = {}
    for name in names:
        if name not in known:
            raise ValueError(
                f"collate_modalities: no sample has {name!r}; they have "
                f"{', '.join(map(repr, known)) or 'nothing'}; give None where it is absent"
            )
        values = [sample.get(name) for sample in samples]
        here = torch.tensor([value is not None for value in values])
        present[name] = here
        inputs[name] = _batch(name, [value for value in values if value is not None], here)
    return Collated(inputs, present)


def _batch(name: str, values: list[Any], here: Tensor) -> Any:
    if not values:
        return None
    try:
        batch = default_collate(values)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"collate_modalities: modality {name!r}: {error}") from error
    if len(values) == len(here):
        return batch

    def spread(rows: Any) -> Any:
        if not isinstance(rows, Tensor):
            raise ValueError(
                f"collate_modalities: modality {name!r} must hold numbers or tensors where some "
                f"samples lack it; got {type(rows).__name__}"
            )
        everyone = rows.new_zeros((len(here), *rows.shape[1:]))
        everyone[here] = rows
        return everyone

    return pytree.tree_map(spread, batch)
