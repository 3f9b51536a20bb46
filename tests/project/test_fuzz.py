"""A short run of the fuzzer (`python -m tests.fuzz` runs it for longer), and that it can fail."""

import pytest
import torch
from fuzz import functional, layers, stacks_oracle
from fuzz.__main__ import PARTS
from fuzz.runner import Runner

from dynmm_kernels import ChainedFusion, EarlyExit, NestedFusion, RoutedFusion, SkipLayer, combine

CASES = {"raw": 800}  # as many wherever they run, so that a failure is one everywhere


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("seed", [0, 70_000])
def test_no_mismatch(part, seed):
    runner = Runner({part: PARTS[part]}, stop_at=3)
    runner.run(seed, cases=CASES.get(part, 300), seconds=600.0)
    assert runner.tallies[part].cases
    assert not runner.failures, "\n".join(str(failure) for failure in runner.failures)


def flipped(plan, outputs, weights=None, **options):
    return combine(plan, outputs[::-1], weights, **options)


def without_temperature(forward):
    def patched(self, *inputs, **options):
        kept, self.temperature = self.temperature, 1.0
        try:
            return forward(self, *inputs, **options)
        finally:
            self.temperature = kept

    return patched


def half_the_gradient(forward):
    """Right values, wrong gradients."""

    def patched(self, *inputs, **options):
        result = forward(self, *inputs, **options)
        output = result[0]
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output = (output + output.detach()) * 0.5
        return (output, *result[1:])

    return patched


def first_mismatch(part: str, cases: int = 400) -> Runner:
    runner = Runner({part: PARTS[part]})
    runner.run(seed=0, cases=cases, seconds=60.0)
    return runner


FAULTS = [
    ("functional", functional, "combine", flipped),
    ("routed", RoutedFusion, "forward", without_temperature(RoutedFusion.forward)),
    ("routed", RoutedFusion, "forward", half_the_gradient(RoutedFusion.forward)),
    ("nested", NestedFusion, "forward", without_temperature(NestedFusion.forward)),
    ("chained", ChainedFusion, "forward", half_the_gradient(ChainedFusion.forward)),
    ("nested", stacks_oracle, "fixed", lambda weights, hard, gate_grad: hard),
    ("skip", SkipLayer, "forward", half_the_gradient(SkipLayer.forward)),
    ("skip", layers, "fixed", lambda weights, hard, gate_grad: hard),
    ("exit", EarlyExit, "forward", without_temperature(EarlyExit.forward)),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("part", "owner", "name", "fault"), FAULTS)
def test_a_fault_is_found_and_told(part, owner, name, fault, monkeypatch, capsys):
    monkeypatch.setattr(owner, name, fault)
    (failure,) = first_mismatch(part).failures
    assert f"python -m tests.fuzz --only {part} --seed {failure.seed} --cases 1" in str(failure)
    assert str(failure) in capsys.readouterr().out
    with pytest.raises(type(failure.error)):
        PARTS[part](failure.draw())
    monkeypatch.undo()
    PARTS[part](failure.draw())


def test_a_seed_draws_the_same_case(monkeypatch):
    seen = []
    for _ in range(2):
        runner = Runner({"routed": PARTS["routed"]}, stop_at=99)
        runner.run(seed=5, cases=20, seconds=60.0)
        seen.append((runner.tallies["routed"].outcomes, runner.tallies["routed"].values))
    assert seen[0] == seen[1]
