"""The ops without anybody in front of them: every argument wrong in every way, and random calls."""

from collections.abc import Iterator
from typing import Any

import pytest
import raw_calls
import torch
from torch import Tensor

from dynmm_kernels.ops.checks import ENERGY, GIVEN, SOFTMAX
from dynmm_kernels.ops.schemas import OPS

ORDER = torch.tensor([0, 2, 1, 3, 5, 4], dtype=torch.int32)
INVERSE = torch.tensor([[0, 1], [4, -1], [2, 3]], dtype=torch.int32)
X, MAPS = torch.randn(3, 4), torch.randn(3, 4, 2, 2)
WEIGHTS, FACTORS = torch.rand(3, 2), torch.rand(2, 4)
CLASSES, LABELS = torch.tensor([0, 3, 1]), torch.rand(3, 4)
PRESENT = torch.tensor([[True, False], [False, False], [True, True]])
ENERGIES = torch.stack([X.logsumexp(1), (X + 1).logsumexp(1), X.logsumexp(1) + 2], 1)

GOOD: dict[str, tuple[Any, ...]] = {
    "route": (torch.tensor([[0, 1], [-1, 2]]), 3),
    "route of a mask": (torch.ones(4, 3, dtype=torch.bool), 3),
    "route_argmax": (X,),
    "gather_rows": ([X, X[:, 0]], [0, 2], [2, 6], ORDER, 2),
    "gather_rows, weighted": ([X, X], [0, 2], [2, 6], ORDER, 2, WEIGHTS),
    "combine_rows": ([X[:2], X], [0, 2], INVERSE),
    "combine_rows, weighted": ([X[:2], X], [0, 2], INVERSE, WEIGHTS),
    "row_dots": (X, [X[:2], X], [0, 2], INVERSE),
    "se_add": (MAPS, MAPS[:2], FACTORS, FACTORS),
    "se_add_means": (MAPS,),
    "se_add_dots": (MAPS, MAPS, MAPS[:2]),
    "se_add_grads": (MAPS, FACTORS, FACTORS, FACTORS, FACTORS),
    "energy_fuse": ([X, X + 1], None, None, None, ENERGY, 0.1),
    "energy_fuse, softmax, with classes": ([X, X + 1], CLASSES, PRESENT, None, SOFTMAX, 0.1),
    "energy_fuse, given, with labels": ([X, X + 1], LABELS, None, WEIGHTS, GIVEN, 0.1),
    "energy_fuse_grads": (
        *([X, X + 1], CLASSES, PRESENT, None, ENERGY, 0.1, False),
        *(ENERGIES, X, WEIGHTS, ENERGIES),
    ),
    "energy_fuse_grads, given, with labels": (
        *([X, X + 1], LABELS, None, WEIGHTS, GIVEN, 0.1, True),
        *(ENERGIES, None, None, ENERGIES),
    ),
}
SPOILT_INTS = (-(2**62), -1, 0, 2**20 + 1, 2**62)


def good_calls(op: str) -> list[tuple[Any, ...]]:
    """Arguments that `op` takes, at least one case of them."""
    calls = [arguments for name, arguments in GOOD.items() if op_of(name) == op]
    assert calls, f"{op} has no good calls"
    return calls


def op_of(name: str) -> str:
    return name.replace(",", " ").split()[0]


def spoilt_tensors(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "float64", tensor.double()
    yield "int64", tensor.long()
    yield "bool", tensor.bool()
    yield "complex64", tensor.to(torch.complex64)
    yield "float8", tensor.float().to(torch.float8_e4m3fn)
    yield "on meta", tensor.to("meta")
    yield "sparse", torch.zeros(tensor.shape, dtype=tensor.dtype, layout=torch.sparse_coo)
    yield "0-dim", tensor.reshape(-1)[0]
    yield "1-dim", tensor.reshape(-1)
    yield "one dim more", tensor[..., None]
    yield "fewer rows", tensor[:-1]
    yield "more rows", torch.cat([tensor, tensor])
    yield "narrower", tensor[..., :-1]
    yield "wider", torch.cat([tensor, tensor], -1)
    yield "empty", tensor[:0]


def spoilt_lists(values: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    yield "none", []
    yield "one fewer", values[:-1]
    yield "one more", [*values, values[-1]]
    yield "reversed", values[::-1]
    for i, value in enumerate(values):
        for told, other in spoilt(value):
            yield f"{i} {told}", [*values[:i], other, *values[i + 1 :]]


def spoilt(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield from spoilt_tensors(value)
    elif isinstance(value, list):
        yield from spoilt_lists(value)
    elif value is None:
        yield "a tensor", X
    elif isinstance(value, float):
        yield from ((str(number), number) for number in (0.0, -value, float("nan")))
    elif not isinstance(value, bool):
        yield from ((str(number), number) for number in (*SPOILT_INTS, value - 1, value + 1))


def raw_list() -> Iterator[tuple[str, raw_calls.Call]]:
    """Each good call, and then with one argument spoilt; a few hundred, most of them refused."""
    for name, arguments in GOOD.items():
        op = op_of(name)
        yield name, (op, list(arguments))
        for at, value in enumerate(arguments):
            for told, other in spoilt(value):
                call = op, [*arguments[:at], other, *arguments[at + 1 :]]
                if raw_calls.has_values(call):
                    yield f"{name}: argument {at} {told}", call
    for told, index in (("low", -(2**31)), ("-1", -1), ("just beyond", 6), ("high", 2**31 - 1)):
        entries = ORDER.clone()
        entries[1] = index
        for weights in ([], [WEIGHTS]):
            yield f"an entry {told}", ("gather_rows", [[X], [0], [6], entries, 2, *weights])
        slots = INVERSE.clone()
        slots[1, 0] = index
        yield f"a slot {told}", ("combine_rows", [[X[:2], X], [0, 2], slots])
        yield f"a slot {told}", ("row_dots", [X, [X[:2], X], [0, 2], slots])


def test_the_raw_list():
    """Refused in the words of the reference, or its result."""
    calls = list(raw_list())
    refused = [
        isinstance(raw_calls.outcome(raw_calls.run_reference, call), str) for _, call in calls
    ]
    assert sum(refused) >= 129
    problems = {
        name: problem
        for name, call in calls
        if (problem := raw_calls.difference(raw_calls.run_dispatched, call))
    }
    assert problems == {}


@pytest.mark.parametrize("op", OPS)
def test_good_calls(op):
    """Every op has some, which nobody refuses."""
    for arguments in good_calls(op):
        call = op, list(arguments)
        assert not isinstance(raw_calls.outcome(raw_calls.run_reference, call), str)
        assert raw_calls.difference(raw_calls.run_dispatched, call) is None


@pytest.mark.parametrize("seed", range(4))
def test_random_calls(seed):
    for call in raw_calls.random_calls(100, seed):
        problem = raw_calls.difference(raw_calls.run_dispatched, call)
        assert problem is None, f"{call[0]}{raw_calls.told(call[1])}: {problem}"
