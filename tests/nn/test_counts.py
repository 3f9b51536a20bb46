"""Launches, allocations and waits per call: exactly those of the table in docs/numbers.md."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import Count, Counter, Quiet, taking_turns

from dynmm_kernels import Branch, ChainedFusion, NestedFusion, RoutedFusion

ROWS, CELLS, COLUMNS = 12, 3, 4
NUMBERS = Path(__file__).parents[2] / "docs" / "numbers.md"
MODALITIES = ("image", "text", "audio")


def routed(counter: Counter, inputs: dict, plain: bool = False, **options: Any) -> Callable:
    """One cheap branch, one that reads all."""
    gate = Quiet(counter, 2, taking_turns(ROWS, 2, counter.device))
    cheap, costly = (Quiet(counter, COLUMNS) for _ in range(2))
    if plain:
        return functools.partial(RoutedFusion(gate, [cheap, costly], **options), *inputs.values())
    branches = [Branch(cheap, inputs=MODALITIES[:1]), Branch(costly, inputs=MODALITIES)]
    fusion = RoutedFusion(gate, branches, **options)
    return functools.partial(fusion, inputs)


def forced(counter: Counter, inputs: dict, choice: Any, **options: Any) -> Callable:
    fuse = routed(counter, inputs, **options)
    drawn = torch.Generator().manual_seed(0)
    return functools.partial(fuse, choice=choice, generator=drawn)


def stack(counter: Counter, inputs: dict, kind: type, **options: Any) -> Callable:
    stages = [[Quiet(counter, COLUMNS) for _ in range(CELLS)] for _ in range(3)]
    if kind is NestedFusion:
        gates: Any = Quiet(counter, CELLS + 1, taking_turns(ROWS, CELLS + 1, counter.device))
    else:
        gates = [Quiet(counter, 2, taking_turns(ROWS, 2, counter.device)) for _ in range(CELLS)]
    depth = options.pop("depth", None)
    fuse = kind(gates, *stages, **options)
    return functools.partial(fuse, *[*inputs.values()][:2], depth=depth)


nested = functools.partial(stack, kind=NestedFusion)
chained = functools.partial(stack, kind=ChainedFusion)


# What the table calls them: the fusion, how it runs, whether it trains.
CASES: dict[tuple[str, str], tuple[bool, Callable, dict[str, Any]]] = {
    ("`RoutedFusion`", "inference, branches read all inputs"): (False, routed, {"plain": True}),
    ("`RoutedFusion`", "inference"): (False, routed, {}),
    ("`RoutedFusion`", "inference, masked"): (False, routed, {"execution": "masked"}),
    ("`RoutedFusion`", "inference, `choice=1`"): (False, forced, {"choice": 1}),
    ("`RoutedFusion`", 'inference, `choice="random"`'): (False, forced, {"choice": "random"}),
    ("`RoutedFusion`", '`"straight_through"`'): (True, routed, {}),
    ("`RoutedFusion`", '`"selected"`'): (True, routed, {"gate_grad": "selected"}),
    ("`RoutedFusion`", '`"none"`'): (True, routed, {"gate_grad": "none"}),
    ("`RoutedFusion`", "masked"): (True, routed, {"execution": "masked"}),
    ("`RoutedFusion`", "`choice=1`"): (True, forced, {"choice": 1}),
    ("`RoutedFusion`", '`choice="random"`'): (True, forced, {"choice": "random"}),
    ("`NestedFusion`", "inference"): (False, nested, {}),
    ("`NestedFusion`", "inference, masked"): (False, nested, {"execution": "masked"}),
    ("`NestedFusion`", "inference, `depth=1`"): (False, nested, {"depth": 1}),
    ("`NestedFusion`", 'inference, `depth="random"`'): (False, nested, {"depth": "random"}),
    ("`NestedFusion`", '`"straight_through"`'): (True, nested, {}),
    ("`NestedFusion`", "masked"): (True, nested, {"execution": "masked"}),
    ("`ChainedFusion`", "inference"): (False, chained, {}),
    ("`ChainedFusion`", "inference, masked"): (False, chained, {"execution": "masked"}),
    ("`ChainedFusion`", '`"straight_through"`'): (True, chained, {}),
    ("`ChainedFusion`", "masked"): (True, chained, {"execution": "masked"}),
}


def counted(device: str, trains: bool, build: Callable, options: dict[str, Any]) -> Counter:
    inputs = {name: torch.randn(ROWS, COLUMNS, device=device) for name in MODALITIES}
    counter = Counter(device)
    fuse = build(counter, inputs, **{"execution": "routed"} | options)
    fuse.func.train(trains)
    upstream = torch.ones(ROWS, COLUMNS, device=device)

    def call() -> None:
        with torch.set_grad_enabled(trains):
            output = fuse()
            if trains:
                output.backward(upstream)

    call()  # what is made once and kept is there
    fuse.func.zero_grad()
    torch.manual_seed(0)
    counter.clear()
    with counter:
        call()
    return counter


def published() -> dict[tuple[str, str], Count]:
    """The table: what, how, launches, allocations, waits, and what they were."""
    row = re.compile(r"\| (`\w+Fusion`) \| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \|")
    found = row.findall(NUMBERS.read_text())
    return {(what, how): Count(*map(int, numbers)) for what, how, *numbers in found}


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return request.param


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch) -> None:
    """Other tests fill it, which would be counted."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_counts_are_those_published(device, case):
    counter = counted(device, *CASES[case])
    noted = counter.launched, counter.allocated, counter.waited
    assert counter.count() == published()[case], noted


def test_the_table_has_these_rows_and_no_others():
    assert [*published()] == [*CASES]
