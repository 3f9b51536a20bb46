"""Small models, a masked fusion in plain PyTorch to compare with, and probes on what runs.

The reference shares no code with the library: it runs every branch on every sample and multiplies
by the hard one-hot with the softmax's gradient, sample by sample what the paper's equation says.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FEATURES = 6
MODES = ["masked", "routed", "auto"]
CHOICES = {
    "mixed": [0, 2, 1, 0, 2, 2, 1],
    "branch 1 starved": [0, 2, 0, 0, 2],
    "all to one": [1, 1, 1, 1],
    "one row": [2],
}
GATE_GRADS = ["straight_through", "selected", "none"]


def samples(n: int, features: int = FEATURES, dtype=torch.float64) -> Tensor:
    return torch.randn(n, features, dtype=dtype)


def mlp(outputs: int = 3, features: int = FEATURES, dtype: torch.dtype = torch.float64):
    return nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, outputs)).to(dtype)


def toy(num_branches: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list]:
    """A gate and branches over one tensor [N, FEATURES]."""
    gate = mlp(num_branches, dtype=dtype)
    return gate, [mlp(dtype=dtype) for _ in range(num_branches)]


class Planned(nn.Module):
    """The logits of `gate` replaced by a decision; the gate still gets their gradient."""

    def __init__(self, gate: nn.Module, choice: Tensor, num_branches: int):
        super().__init__()
        self.gate = gate
        self.register_buffer("planned", torch.zeros(len(choice), num_branches))
        self.decide(choice)

    def decide(self, choice: Tensor) -> None:
        self.planned.copy_(2 * F.one_hot(choice, self.planned.shape[1]))

    def forward(self, *inputs: Any) -> Tensor:
        real = self.gate(*inputs)
        return self.planned.to(real.dtype) + (real - real.detach())


class FixedGate(nn.Module):
    """Logits that are a parameter, whatever the inputs are."""

    def __init__(self, logits: Tensor, requires_grad: bool = True):
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=requires_grad)

    def forward(self, *inputs: Any) -> Tensor:
        return self.logits


def choosing(choice: Sequence[int], num_branches: int, dtype=torch.float64) -> FixedGate:
    """A gate that learns, and that chooses this."""
    return FixedGate(2 * F.one_hot(torch.tensor(choice), num_branches).to(dtype))


class Function(nn.Module):
    """A branch without parameters."""

    def __init__(self, call: Callable[..., Any]):
        super().__init__()
        self.call = call

    def forward(self, *inputs: Any) -> Any:
        return self.call(*inputs)


def hard_weights(logits: Tensor, temperature: float = 1.0) -> Tensor:
    probs = torch.softmax(logits / temperature, dim=1)
    hard = F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(probs.dtype)
    return hard - probs.detach() + probs


def blend(weights: Tensor, outputs: Sequence[Any]) -> Any:
    """sum_b weights[:, b] * outputs[b]; leaves that are not floating are picked by the weights."""

    def leaf(*column: Tensor) -> Tensor:
        if not column[0].is_floating_point():
            chosen = weights.argmax(dim=1).tolist()
            return torch.stack([column[b][n] for n, b in enumerate(chosen)])
        shape = (-1,) + (1,) * (column[0].dim() - 1)
        return sum(weights[:, b].reshape(shape) * output for b, output in enumerate(column))

    return tree_map(leaf, *outputs)


def masked_fusion(gate: nn.Module, branches: Sequence[nn.Module], temperature: float = 1.0):
    """What routed execution must agree with, as a call."""

    def fuse(*inputs: Any) -> Any:
        weights = hard_weights(gate(*inputs), temperature)
        return blend(weights, [branch(*inputs) for branch in branches])

    return fuse


@dataclass
class Gradients:
    output: Any
    parameters: list[Tensor | None]
    inputs: list[Tensor | None]

    def all(self) -> list[Tensor | None]:
        return self.parameters + self.inputs


def backward(
    fuse: Callable[..., Any], modules: Iterable[nn.Module], inputs: Any, upstream_seed: int = 0
) -> Gradients:
    """Output and gradients for a fixed random upstream gradient; leaves no `.grad` behind."""
    inputs = tree_map(lambda x: x.detach().clone().requires_grad_() if is_float(x) else x, inputs)
    parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
    output = fuse(*inputs)
    generator = torch.Generator().manual_seed(upstream_seed)
    leaves = [leaf for leaf in tree_leaves(output) if is_float(leaf)]
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in leaves]
    torch.autograd.backward(leaves, [u.to(y.dtype) for u, y in zip(upstream, leaves, strict=True)])
    result = Gradients(
        tree_map(lambda y: y.detach(), output),
        [p.grad for p in parameters],
        [x.grad for x in tree_leaves(inputs) if is_float(x)],
    )
    for parameter in parameters:
        parameter.grad = None
    return result


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value that is expected."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference / max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)


def assert_same(actual: Gradients, expected: Gradients, tolerance: float = 1e-10) -> None:
    """Outputs and gradients to `tolerance` of their scale; None only where None is expected."""
    assert_close(actual.output, expected.output, tolerance)
    assert len(actual.all()) == len(expected.all())
    for a, e in zip(actual.all(), expected.all(), strict=True):
        assert (a is None) == (e is None)
        assert e is None or relative_error(a, e) <= tolerance


def assert_masked(
    fusion: nn.Module, masked: Callable[..., Any], modules: Iterable[nn.Module], inputs: tuple
) -> None:
    """Trained and then served, `fusion` does what `masked` does."""
    assert_same(backward(fusion, modules, inputs), backward(masked, modules, inputs))
    assert_served(fusion, masked, inputs)


def assert_served(fusion: nn.Module, masked: Callable[..., Any], inputs: tuple) -> None:
    """In eval without a graph, as a deployed model is called."""
    fusion.eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_close(fusion(*inputs), masked(*inputs))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    for a, e in pairs:
        assert a.dtype == e.dtype
        if is_float(e):
            assert relative_error(a, e) <= tolerance
        else:
            assert torch.equal(a, e)


def assert_bitwise(actual: Gradients, expected: Gradients) -> None:
    pairs = zip(
        tree_leaves(actual.output) + actual.all(),
        tree_leaves(expected.output) + expected.all(),
        strict=True,
    )
    for a, e in pairs:
        assert (a is None) == (e is None)
        assert a is None or torch.equal(a, e)


@dataclass
class Calls:
    """Rows and arguments of every call of each module, seen by forward hooks."""

    rows: list[list[int]] = field(default_factory=list)
    arguments: list[list[tuple]] = field(default_factory=list)

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> "Calls":
        calls = cls()
        for index, module in enumerate(modules):
            calls.rows.append([])
            calls.arguments.append([])
            module.register_forward_pre_hook(
                lambda _, arguments, index=index: calls.note(index, arguments)
            )
        return calls

    def note(self, index: int, arguments: tuple) -> None:
        self.arguments[index].append(arguments)
        self.rows[index].append(len(next(x for x in tree_leaves(arguments) if is_tensor(x))))

    def total(self) -> list[int]:
        return [sum(rows) for rows in self.rows]

    def clear(self) -> None:
        for per_module in (*self.rows, *self.arguments):
            per_module.clear()


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


class Touched(TorchDispatchMode):
    """Storages of all tensors that any operator is given."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor):
                self.storages.add(leaf.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.storages
