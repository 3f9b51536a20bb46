"""What `RoutedFusion` is documented to compute: every sample by itself, in plain PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compare import Skip
from .routed_model import Model, Reader
from .trees import flat

TIE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}


@dataclass
class Answer:
    """Leaves of the output in order, and what `Routing` should say."""

    leaves: list[Any]
    weights: Tensor
    choice: Tensor | None
    probs: Tensor | None


def hard_weights(model: Model, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [n, B] with their gradient, the choice, the probabilities."""
    fusion = model.fusion
    select, scaled = fusion.select, logits / fusion.temperature
    probs = scaled.sigmoid() if select == "multi_hot" else scaled.softmax(1)
    if select == "multi_hot":
        apart, choice = logits.abs(), logits > 0
        taken = choice.to(probs)
    else:
        ranked = logits.sort(1, descending=True)
        apart = -ranked.values.diff(dim=1)
        choice = ranked.indices[:, :select]
        taken = torch.zeros_like(probs).scatter(1, choice, 1.0)
        choice = choice[:, 0] if select == 1 else choice
    tie = TIE[torch.bfloat16 if model.context == "autocast" else logits.dtype]
    if apart.numel() and apart.min() < tie:
        raise Skip("near a tie")
    learns = probs - probs.detach()
    if fusion.execution == "dense":
        weights = probs
    elif select not in (1, "multi_hot"):
        weights = torch.zeros_like(probs).scatter(1, choice, scaled.gather(1, choice).softmax(1))
        weights = weights.detach() if fusion.gate_grad == "none" else weights
    elif fusion.gate_grad == "none":
        weights = taken
    else:
        weights = taken + (learns * taken if fusion.gate_grad == "selected" else learns)
    return weights, choice, probs


def noise_of(model: Model, routing: Any, samples: slice, logits: Tensor) -> Tensor:
    """The noise that the library drew, up to a constant per sample."""
    probs = routing.probs[samples].detach()
    shifted = probs.logit() if model.fusion.select == "multi_hot" else probs.log()
    return model.fusion.temperature * shifted - logits.detach()


def forced_weights(model: Model, routing: Any, samples: slice) -> tuple[Tensor, Tensor | None]:
    count, like = len(model.branches), torch.zeros((), dtype=model.dtype)
    rows = len(range(model.num_rows)[samples])
    if isinstance(model.choice, str) and model.choice == "uniform":
        return torch.full((rows, count), 1 / count, dtype=like.dtype), None
    if isinstance(model.choice, Tensor) and model.choice.dtype == torch.bool:
        mask = model.choice[samples]
        return mask.to(like), mask
    if isinstance(model.choice, int):
        choice = torch.full((rows,), model.choice)
    else:
        choice = (routing.choice if isinstance(model.choice, str) else model.choice)[samples]
    return (choice[:, None] == torch.arange(count)).to(like), choice


class Batchwise:
    """A branch with train-mode BatchNorm: run once, on the whole batch or on its own samples."""

    def __init__(self, reader: Reader, num_rows: int, own: Tensor | None) -> None:
        self.positions = range(num_rows) if own is None else own.nonzero()[:, 0].tolist()
        self.output = None
        if self.positions:
            self.output = reader(slice(None) if own is None else own)

    def __call__(self, samples: slice) -> Any:
        at = list(self.positions).index(samples.start)
        leaves = flat(self.output)
        return [leaf[at : at + 1] if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def answer(model: Model, routing: Any, record_all: bool) -> Answer:
    """Every sample by itself.

    Args:
        routing: of the library's run, for what was drawn at random.
        record_all: also run branches of weight 0, as masked execution does, so that what gets
            a gradient of zeros is told from what gets none.
    """
    rows = model.num_rows
    chunks = [slice(n, n + 1) for n in range(rows)] if rows else [slice(0, 0)]
    decided = []
    for samples in chunks:
        if model.choice is None:
            logits = model.gate(samples)
            if model.noisy:
                logits = logits + noise_of(model, routing, samples, logits)
            decided.append(hard_weights(model, logits))
        else:
            decided.append((*forced_weights(model, routing, samples), None))
    columns = list(zip(*decided, strict=True))
    weights = torch.cat(columns[0])
    if subset_statistics(model) and not weights.detach().any():
        raise Skip("nobody has a branch: one is run all the same, for the shape of its output")
    runs = [
        branch_runner(model, i, weights.detach()[:, i] != 0) for i in range(len(model.branches))
    ]
    ran = [
        [
            run(samples) if record_all or kept.detach()[:, i].any() or not rows else None
            for i, run in enumerate(runs)
        ]
        for samples, kept in zip(chunks, columns[0], strict=True)
    ]
    if model.fusion.outputs == "sum":
        leaves = summed(ran, columns[0])
        add_losses(model, leaves, weights.detach() != 0, record_all)
    else:
        leaves = kept_apart(model, ran, weights, record_all)
    soft = model.fusion.execution == "dense" and model.choice is None
    return Answer(
        leaves,
        weights,
        None if soft or columns[1][0] is None else torch.cat(columns[1]),
        None if columns[2][0] is None else torch.cat(columns[2]),
    )


Ran = list[list[list[Any] | None]]  # by sample, by branch: leaves, or None where it did not run


def summed(ran: Ran, weights: Sequence[Tensor]) -> list[Any]:
    parts = [mixed_leaves(outputs, kept) for outputs, kept in zip(ran, weights, strict=True)]
    filled = next((part for part in parts if part is not None), None)
    if filled is None:
        raise Skip("no sample has a branch, so nothing says what a row looks like")
    empty = [torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in filled]
    return [stacked(column) for column in zip(*(part or empty for part in parts), strict=True)]


def stacked(column: Sequence[Any]) -> Any:
    """One leaf of every sample; what is no tensor with rows is the same for all."""
    return torch.cat([*column]) if has_rows(column[0]) else column[0]


def has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def kept_apart(model: Model, ran: Ran, weights: Tensor, record_all: bool) -> list[Any]:
    """w * E(x) + (1 - w) * fill of every branch, then joined as the fusion says."""
    kind, parts = model.fusion.outputs, []
    for b, reader in enumerate(model.branches):
        outputs = [sample[b] for sample in ran]
        like = next((leaves for leaves in outputs if leaves is not None), None)
        if like is None:
            if reader.batch_norm and model.fusion.training:
                raise Skip("its statistics would be recorded again")
            with torch.no_grad():
                like = list(flat(reader(slice(0, 1))))
        rows = [
            [entry(model, leaf, weights[n : n + 1, b]) for leaf in leaves]
            if leaves is not None
            else [absent(model, leaf) for leaf in like]
            for n, leaves in enumerate(outputs)
        ]
        parts.append([stacked(column) for column in zip(*rows, strict=True)])
        if kind == "dict":
            add_losses(model, parts[-1], weights.detach() != 0, record_all, [b])
    if kind == "dict":
        return [leaf for part in parts for leaf in part]
    join = torch.stack if kind == "stack" else torch.cat
    leaves = [
        join([leaf.as_subclass(Tensor) for leaf in column], 1) if has_rows(column[0]) else column[0]
        for column in zip(*parts, strict=True)
    ]
    add_losses(model, leaves, weights.detach() != 0, record_all)
    return leaves


def entry(model: Model, leaf: Any, weight: Tensor) -> Any:
    if not has_rows(leaf):
        return leaf
    leaf = leaf.as_subclass(Tensor)
    weight = weight.reshape(-1, *[1] * (leaf.ndim - 1))
    if leaf.is_floating_point():
        weight = weight.to(leaf.dtype)
    if leaf.is_floating_point() or leaf.is_complex():
        return (weight * leaf + (1 - weight) * model.fusion.fill).to(leaf.dtype)
    return torch.where(weight.detach() != 0, leaf, absent(model, leaf))


def absent(model: Model, leaf: Any) -> Any:
    return torch.full_like(leaf, model.fusion.fill) if has_rows(leaf) else leaf


def add_losses(
    model: Model, leaves: list[Any], chosen: Tensor, record_all: bool, of: Any = None
) -> None:
    """Auxiliary losses, of the rows that each branch runs on, where somebody chose it."""
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not leaf.ndim]
    soft = model.fusion.execution == "dense" and model.choice is None
    soft = soft or (isinstance(model.choice, str) and model.choice == "uniform")
    whole = soft or model.fusion.execution == "masked"
    for i in places:
        leaves[i] = torch.zeros((), dtype=leaves[i].dtype)
    branches = range(len(model.branches)) if of is None else of
    for b, reader in ((b, model.branches[b]) for b in branches if places):
        counts = soft or bool(chosen[:, b].any())
        if not (counts or record_all):
            continue
        output = list(flat(reader(slice(None) if whole or not counts else chosen[:, b])))
        for i in places:
            leaves[i] = leaves[i] + (output[i] if counts else 0.0 * output[i])


def branch_runner(model: Model, index: int, chosen: Tensor):
    reader, fusion = model.branches[index], model.fusion
    if not (reader.batch_norm and fusion.training and model.num_rows):
        return lambda samples: list(flat(reader(samples)))
    own = chosen if subset_statistics(model) else None
    if own is None:
        return Batchwise(reader, model.num_rows, None)
    batchwise = Batchwise(reader, model.num_rows, own)
    return lambda samples: batchwise(samples) if own[samples.start] else None


def subset_statistics(model: Model) -> bool:
    fusion = model.fusion
    whole = fusion.execution == "masked" or (fusion.execution == "dense" and model.choice is None)
    if whole or fusion.batch_norm == "masked":
        return False
    return not (isinstance(model.choice, str) and model.choice == "uniform")


def mixed_leaves(outputs: list[list[Any] | None], weights: Tensor) -> list[Any] | None:
    """The weighted sum, leaf by leaf; integers come from the branch that was chosen."""
    present = [(i, output) for i, output in enumerate(outputs) if output is not None]
    if not present:
        return None
    leaves = []
    for place, like in enumerate(present[0][1]):
        if not isinstance(like, Tensor) or not like.ndim:
            leaves.append(like)
            continue
        total: Any = 0
        for i, output in present:
            leaf = output[place].as_subclass(Tensor)
            weight = weights[:, i].reshape(-1, *[1] * (leaf.ndim - 1))
            if leaf.is_floating_point() or leaf.is_complex():
                term = weight.to(leaf.dtype if leaf.is_floating_point() else weight.dtype) * leaf
            else:
                term = (weight.detach() != 0) * leaf
            total = total + term
        leaves.append(total.to(like.dtype))
    return leaves
