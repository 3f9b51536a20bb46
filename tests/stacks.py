"""Two-stream stacks, and their masked formula in plain PyTorch to compare with."""

import functools
from collections.abc import Sequence

import torch
from models import hard_weights, mlp
from torch import Tensor, nn

CHANNELS = 4
KINDS = ["mlp", "nchw", "channels_last"]


class SumFusion(nn.Module):
    """A fusion with parameters, whose rows do not depend on each other."""

    def __init__(self, features: int):
        super().__init__()
        self.main = nn.Parameter(torch.randn(features, dtype=torch.float64))
        self.aux = nn.Parameter(torch.randn(features, dtype=torch.float64))

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (main.dim() - 2)
        return main * self.main.view(shape) + torch.tanh(aux * self.aux.view(shape))


class Pool(nn.Module):
    """A gate over both streams, of any rank."""

    def __init__(self, features: int, columns: int):
        super().__init__()
        self.linear = nn.Linear(features, columns, dtype=torch.float64)

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        pooled = [x.flatten(2).mean(2) if x.dim() > 2 else x for x in (main, aux)]
        return self.linear(torch.cat(pooled, dim=1))


def parts(kind: str, num_stages: int) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Main stages, auxiliary stages and fusions."""
    if kind == "mlp":
        main = [mlp(CHANNELS, CHANNELS) for _ in range(num_stages)]
        aux = [mlp(CHANNELS, CHANNELS) for _ in range(num_stages)]
    else:
        conv = functools.partial(nn.Conv2d, padding=1, dtype=torch.float64)
        main = [nn.Sequential(conv(CHANNELS, CHANNELS, 3), nn.Tanh()) for _ in range(num_stages)]
        aux = [nn.Sequential(conv(CHANNELS, CHANNELS, 3), nn.Tanh()) for _ in range(num_stages)]
    return main, aux, [SumFusion(CHANNELS) for _ in range(num_stages)]


def batch(kind: str, size: int) -> tuple[Tensor, Tensor]:
    shape = (size, CHANNELS) if kind == "mlp" else (size, CHANNELS, 3, 5)
    pair = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    if kind == "channels_last":
        pair = [x.to(memory_format=torch.channels_last) for x in pair]
    return pair[0], pair[1]


def column(weight: Tensor, like: Tensor) -> Tensor:
    return weight.reshape(-1, *[1] * (like.dim() - 1))


def where_zero_fixed(weight: Tensor) -> Tensor:
    """A weight that is 0 gets no gradient."""
    return torch.where(weight.detach() == 0, torch.zeros_like(weight), weight)


def masked_nested(
    gate, main_stages, aux_stages, fusions, *, mode="straight_through", temperature=1.0, stages=()
):
    """The formula of the depth gate, as a call; every weight sum written out."""

    def fuse(main: Tensor, aux: Tensor):
        logits = gate(main, aux)
        if mode == "dense":
            weights = torch.softmax(logits / temperature, dim=1)
        else:
            weights = hard_weights(logits, temperature)
        if mode == "none":
            weights = weights.detach()
        outputs = []
        for k in range(1, len(main_stages) + 1):
            active = sum(weights[:, d] for d in range(k, weights.shape[1]))
            skip = sum(weights[:, d] for d in range(k))
            if mode == "selected":
                active, skip = where_zero_fixed(active), where_zero_fixed(skip)
            r, aux = main_stages[k - 1](main), aux_stages[k - 1](aux)
            main = column(skip, r) * r + column(active, r) * fusions[k - 1](r, aux)
            outputs.append(main)
        return (main, [outputs[k - 1] for k in stages]) if stages else main

    return fuse


def masked_chain(
    gates,
    main_stages,
    aux_stages,
    fusions,
    *,
    rules=None,
    mode="straight_through",
    temperature=1.0,
    stages=(),
    keeps=None,
    gates_read="cells",
    independent=False,
):
    """The formula of one gate per cell, as a call; the list `keeps` receives every keep_k."""
    rules = rules or ["dynamic"] * len(main_stages)

    def fuse(main: Tensor, aux: Tensor):
        keep = main.new_ones(len(main))
        outputs, unfused = [], main
        for k, rule in enumerate(rules):
            own = torch.ones_like(keep)
            if rule == "dynamic":
                logits = gates[k](unfused if gates_read == "stages" else main, aux)
                if mode == "dense":
                    own = torch.softmax(logits / temperature, dim=1)[:, 1]
                else:
                    own = hard_weights(logits, temperature)[:, 1]
                if mode == "none":
                    own = own.detach()
            if (
                mode == "selected" and not independent
            ):  # what a dropped sample would do later is not known
                own = torch.where(keep.detach() == 0, torch.zeros_like(own), own)
            keep = own if independent else keep * own
            active = torch.ones_like(keep) if rule == "fuse_all" else keep
            if keeps is not None:
                keeps.append(active)
            skip = 1 - active
            if mode == "selected":
                skip, active = where_zero_fixed(skip), where_zero_fixed(active)
            unfused = r = main_stages[k](main)
            if any(rule != "skip" for rule in rules[k:]):
                aux = aux_stages[k](aux)
            main = r
            if rule != "skip":
                main = column(skip, r) * r + column(active, r) * fusions[k](r, aux)
            outputs.append(main)
        return (main, [outputs[k - 1] for k in stages]) if stages else main

    return fuse


class HeaderReads:
    """Counts how often the host reads a plan's header: each is one synchronisation."""

    def __init__(self, monkeypatch):
        self.count = 0
        tolist = Tensor.tolist

        def counted(tensor: Tensor):
            self.count += 1
            return tolist(tensor)

        monkeypatch.setattr(Tensor, "tolist", counted)


def modules_of(*groups: Sequence[nn.Module] | nn.Module) -> list[nn.Module]:
    flat: list[nn.Module] = []
    for group in groups:
        flat += [group] if isinstance(group, nn.Module) else [m for m in group if m is not None]
    return flat
