"""The parts of a stack: stages that map rows to rows, and the cells they form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..branch import Branch, Branches, part
from ..calling import Callee, as_module
from ..memory import unaliased


class Stage(Branch):
    """A part of a stack: tensors [n, ...] in, one tensor [n, ...] out."""

    @property
    def label(self) -> str:
        return str(self.name)

    @property
    def range(self) -> str:
        return self.label

    @property
    def fuses_prefix(self) -> bool:
        """Whether it takes fewer rows of the second tensor than of the first, and fuses those."""
        return getattr(part(self, "module"), "fuses_prefix", False)

    def spare(self, tensor: Tensor, held: Sequence[Tensor]) -> Tensor:
        """`tensor`, or a copy if it lies in memory `held` by others and this stage may write."""
        return unaliased(tensor, held) if self.in_place else tensor

    def run(self, *tensors: Tensor, read: Sequence[Tensor]) -> Tensor:
        """The module's output for tensors of n rows, checked to be a tensor of n rows.

        `read`: what others read, so that the module must not write there.
        """
        output = self.call_reading(read, tensors)
        rows = tensors[0].shape[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"{self.label} must return a tensor; got {type(output).__name__}")
        if output.ndim == 0 or output.shape[0] != rows:
            raise ValueError(
                f"{self.label} must return {rows} rows, one per sample it received; got shape "
                f"{list(output.shape)}"
            )
        if output.device != tensors[0].device:
            raise ValueError(
                f"{self.label} must return rows on {tensors[0].device}, as it received them; got "
                f"{output.device}"
            )
        return output


class Cell(NamedTuple):
    """One step of both streams.

    `fuses`: the fusion is in use. `reads`: so is the auxiliary stage, here or by a later cell.
    """

    main: Stage
    aux: Stage
    fusion: Stage
    fuses: bool = True
    reads: bool = True

    def couples_samples(self) -> bool:
        """Whether samples that fuse depend on which others do: train-mode BatchNorm."""
        return (self.reads and self.aux.couples_samples()) or (
            self.fuses and self.fusion.couples_samples()
        )

    def fuse(self, main: Tensor, aux: Tensor) -> Tensor:
        """The fused rows, checked to be like those of the main stream."""
        fused = self.fusion.run(main, aux, read=(main, aux))
        if fused.shape != main.shape:
            raise ValueError(
                f"{self.fusion.label} must return the shape of what {self.main.label} returns, "
                f"{list(main.shape)}; got {list(fused.shape)}"
            )
        if fused.dtype != main.dtype and not torch.is_autocast_enabled(main.device.type):
            raise TypeError(
                f"{self.fusion.label} must return the dtype of what {self.main.label} returns, "
                f"{main.dtype}; got {fused.dtype}"
            )
        return fused

    def starved(self) -> list[Tensor]:
        """Parameters that no sample reaches."""
        unused: list[Tensor] = []
        if self.reads:
            unused += [*self.aux.parameters()]
        if self.fuses:
            unused += [*self.fusion.parameters()]
        return unused


def make_stages(modules: list[Callee], kind: str) -> Branches:
    """Each module as a `Stage` called "`kind` k", counting from 1; a Branch keeps name and cost."""
    stages = Branches()
    for k, module in enumerate(modules, start=1):
        name, cost = f"{kind} {k}", None
        if isinstance(module, Branch):
            if module.inputs is not None:
                raise ValueError(
                    f"{name}: a stage reads what the stage before it returns; got a Branch with "
                    f"inputs={module.inputs!r}"
                )
            name, cost, module = module.name or name, module.cost, module.module
        stages.append(Stage(as_module(module, name), name=name, cost=cost))
    return stages
