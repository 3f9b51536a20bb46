"""What a profile shows: each phase and each branch by its name, and nothing without a profiler."""

import importlib
from collections import Counter

import pytest
import torch
from models import choosing, toy
from stacks import CHANNELS, Pool, batch, parts
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dynmm_kernels import Branch, ChainedFusion, NestedFusion, RoutedFusion
from dynmm_kernels.nn.routed import ways

PREFIX = "dynmm_kernels::"
OPS = {"route", "route_argmax", "gather_rows", "combine_rows", "row_dots"}


def ranges(call, *inputs) -> Counter:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call(*inputs)
    names = [e.name.removeprefix(PREFIX) for e in profiler.events() if e.name.startswith(PREFIX)]
    return Counter(name for name in names if name.split(".")[0] not in OPS - {"route"})


def routed(choice, **settings) -> RoutedFusion:
    branches = dict(zip(["cheap", "costly"], toy(2)[1], strict=True))
    return RoutedFusion(choosing(choice, 2), branches, execution="routed", **settings)


def without_route(found: Counter) -> Counter:
    """The op `route` has the name of its phase."""
    return Counter({name: count for name, count in found.items() if name != "route"})


ONCE = {"gate": 1, "gather": 1, "combine": 1, "branch[cheap] own": 1, "branch[costly] own": 1}
REST = {"branch[cheap] rest": 1, "branch[costly] rest": 1}


@pytest.mark.parametrize("starved", ["skip", "run"])
def test_routed(starved):
    fusion = routed([0, 1, 1, 0, 1], starved=starved)
    x = torch.randn(5, 6, dtype=torch.float64)
    found = ranges(fusion, x)
    assert found["route"] >= 1
    assert without_route(found) == {**ONCE, **REST, "gather": 2 if starved == "run" else 1}
    fusion.gate_grad = "selected"
    assert without_route(ranges(fusion, x)) == ONCE
    fusion.eval()
    with torch.no_grad():  # the short way
        found = ranges(fusion, x)
    assert found["route"] >= 1
    assert without_route(found) == ONCE


def test_a_branch_that_nobody_chose_is_not_there():
    fusion = routed([1, 1, 1]).eval()
    with torch.no_grad():
        found = ranges(fusion, torch.randn(3, 6, dtype=torch.float64))
    assert without_route(found) == {"gate": 1, "branch[costly] own": 1}


def test_masked():
    fusion = routed([0, 1, 1])
    fusion.execution = "masked"
    found = ranges(fusion, torch.randn(3, 6, dtype=torch.float64))
    assert without_route(found) == {"gate": 1, "branch[cheap] own": 1, "branch[costly] own": 1}


def test_a_gate_with_a_name():
    gate, branches = choosing([0, 1], 2), toy(2)[1]
    fusion = RoutedFusion(Branch(gate, name="mine"), branches, execution="routed")
    assert ranges(fusion, torch.randn(2, 6, dtype=torch.float64))["gate[mine]"] == 1


def test_nested():
    fusion = NestedFusion(choosing([0, 2, 1, 0], 3), *parts("mlp", 2), execution="routed")
    found = ranges(fusion, *batch("mlp", 4))
    once = {f"{kind} {k} own": 1 for kind in ("main stage", "aux stage", "fusion") for k in (1, 2)}
    rest = {f"{kind} {k} rest": 1 for kind in ("aux stage", "fusion") for k in (1, 2)}
    expected = {"gate": 1, "gather": 1, "combine": 3, **once, **rest}
    assert without_route(found) == expected
    fusion.eval()
    with torch.no_grad():
        found = ranges(fusion, *batch("mlp", 4))
    assert without_route(found) == {"gate": 1, "gather": 1, "combine": 1, **once}


def test_chained():
    gates = [choosing([1, 0, 1], 2), Pool(2 * CHANNELS, 2)]
    fusion = ChainedFusion(gates, *parts("mlp", 2), execution="routed")
    nn.init.constant_(gates[1].linear.bias, 0)
    found = ranges(fusion, *batch("mlp", 3))
    expected = {"gate 1": 1, "gate 2": 1, "gate 2 rest": 1, "main stage 1 own": 1}
    expected |= {"aux stage 1 own": 1, "aux stage 1 rest": 1, "fusion 1 rest": 1}
    assert {name: found[name] for name in expected} == expected


def test_an_exception_ends_its_range():
    fusion = routed([0, 1])
    fusion.branches[0].module.register_forward_hook(lambda *_: 1 / 0)

    def fails(x):
        with pytest.raises(ZeroDivisionError):
            fusion(x)

    assert ranges(fails, torch.randn(2, 6, dtype=torch.float64))["gate"] == 1
    fusion.branches[0].module._forward_hooks.clear()
    found = ranges(fusion, torch.randn(2, 6, dtype=torch.float64))
    assert without_route(found) == {**ONCE, **REST}


def test_the_short_way_stays_open_to_one_process(monkeypatch):
    """Profilers and counters of FLOPs import what shards tensors; nothing is sharded by that."""
    importlib.import_module(ways.TENSORS)
    taken, run_flat = [], ways.run_flat
    monkeypatch.setattr(ways, "run_flat", lambda *given: taken.append(1) or run_flat(*given))
    fusion = RoutedFusion(nn.Linear(4, 2), [nn.Linear(4, 3), nn.Linear(4, 3)]).eval()
    with torch.no_grad():
        fusion(torch.randn(5, 4))
    assert taken
