"""Planned decisions, modules for nothing, and a profile of fusions of every kind; no times."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from dynmm_kernels import Branch, Lazy, RoutedFusion, Shared
from dynmm_kernels.measure import profiling, racing
from dynmm_kernels.measure.costs import branch_costs
from dynmm_kernels.measure.planned import Free, PlannedGate, answers, planned_rows, twin
from dynmm_kernels.measure.profiling import SharesError, profile_fusion
from dynmm_kernels.measure.timing import ONCE
from dynmm_kernels.measure.waits import waits
from dynmm_kernels.measure.work import alone, batch_of, gradients, part, whole
from dynmm_kernels.measure.workloads import WORKLOADS

ROWS = 12


@pytest.fixture(autouse=True)
def one_profile(monkeypatch):
    monkeypatch.setattr(profiling, "PROFILED", 1)


def fusion(gate_outputs: int = 3, **options) -> RoutedFusion:
    torch.manual_seed(0)
    branches = {f"b{i}": nn.Linear(6, 4) for i in range(gate_outputs)}
    return RoutedFusion(nn.Linear(6, gate_outputs), branches, **options)


@pytest.mark.parametrize("rows", [1, 2, 7, 32])
@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (1.0, 0.0, 0.0), (1.0, 0.6, 0.4)])
def test_planned_rows(shares, rows):
    chosen = planned_rows(shares, rows)
    assert (chosen.sum(1) == round(sum(shares))).all()
    for count, share in zip(chosen.sum(0).tolist(), shares, strict=True):
        assert abs(count - share * rows) <= 1


def test_planned_rows_of_several():
    chosen = planned_rows((0.5, 0.0, 1.0), 8, several=True)
    assert chosen.sum(0).tolist() == [4, 0, 8]


@pytest.mark.parametrize("returns", ["logits", "probabilities", "weights"])
@pytest.mark.parametrize("select", [1, 2, "multi_hot"])
def test_a_planned_gate_is_obeyed_and_learns(select, returns):
    model = fusion(
        select=select, gate_returns=returns, noise="gumbel" if returns == "logits" else None
    )
    chosen = planned_rows((0.5, 0.5, 1.0 if select == 2 else 0.0), ROWS, select == "multi_hot")
    x = torch.randn(ROWS, 6)
    other = twin(model, "routed", PlannedGate(model.gate.module, answers(model, chosen)))
    _, routing = other(x, return_routing=True)
    assert torch.equal(routing.plan.offsets.diff(), chosen.sum(0).int())
    assert torch.equal(routing.weights.detach() != 0, chosen)
    grads = gradients(lambda: other(x), [model.gate], ())
    assert all(grad is not None for grad in grads)
    assert model.execution == "auto"
    assert isinstance(model.gate.module, nn.Linear)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("execution", ["routed", "masked"])
def test_free_modules_run_like_their_own(execution, training):
    """As many rows, as many calls, outputs of the same shape."""
    model = fusion().train(training)
    batch = batch_of((torch.randn(ROWS, 6, requires_grad=training),))
    chosen = planned_rows((0.5, 0.3, 0.2), ROWS)
    calls: dict[str, list] = {"own": [], "free": []}
    free = []
    for branch in model.branches:
        output = branch(*batch.selected)
        free.append(Free(branch, batch, output))
        for name, module in (("own", branch.module), ("free", free[-1])):
            module.register_forward_hook(
                lambda m, x, y, name=name: calls[name].append((x[0].shape, y.shape))
            )
    gate = PlannedGate(model.gate.module, answers(model, chosen))
    whole(twin(model, execution, gate), batch, training)()
    whole(twin(model, execution, gate, free), batch, training)()
    assert calls["own"]
    assert Counter(calls["own"]) == Counter(calls["free"])


def test_parts_get_the_rows_they_are_asked_for():
    x, y = torch.randn(ROWS, 6), torch.randn(3)
    batch = batch_of(({"x": x, "again": x, "table": Shared(y)},))
    seen = []
    module = nn.Identity()
    module.forward = lambda inputs: seen.append(inputs) or inputs["x"]
    branch = Branch(module, name="b")
    for rows in (5, 30, x[:, 0] > 0):
        alone([part(branch, batch, rows)], training=False)()
    five, thirty, some = seen
    assert torch.equal(five["x"], x[:5])
    assert five["x"] is five["again"]
    assert torch.equal(five["table"], y)
    assert torch.equal(thirty["x"], torch.cat([x, x, x[:6]]))
    assert torch.equal(some["x"], x[x[:, 0] > 0])


def test_a_batch_is_trimmed_and_repeated_and_apart():
    x = nn.Linear(6, 6)(torch.randn(3, 6))
    repeated = batch_of((x, Shared(x)), 7)
    assert repeated.num_rows == 7
    assert repeated.leaves[0].is_leaf
    assert repeated.leaves[0].requires_grad
    assert repeated.leaves[1].tensor is x
    with pytest.raises(TypeError, match="Lazy"):
        batch_of((Lazy(lambda rows: rows), x))
    with pytest.raises(ValueError, match="at least one sample"):
        batch_of((torch.ones(0, 3),))


def test_waits():
    x = torch.tensor([1.0, 0.0])
    assert waits(lambda: x + 1) == 0
    assert waits(lambda: (x.sum().item(), x.nonzero(), x.tolist())) == 3
    model = fusion().eval()
    with torch.no_grad():
        assert waits(lambda: model(torch.randn(ROWS, 6))) == 1


def in_place() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4))


def normed() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 4))


KINDS = {
    "top-1": fusion,
    "multi-hot": lambda: fusion(select="multi_hot"),
    "two of three": lambda: fusion(select=2),
    "selected": lambda: fusion(gate_grad="selected"),
    "no gate": lambda: fusion(gate_grad="none"),
    "probabilities": lambda: fusion(select="multi_hot", gate_returns="weights"),
    "starved": lambda: fusion(starved="run"),
    "norms": lambda: RoutedFusion(nn.Linear(6, 2), [normed(), in_place()]),
    "one": lambda: fusion(1),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_leaves_everything_as_it_was(kind, training):
    model = KINDS[kind]()
    x = torch.randn(ROWS, 6)
    if kind == "probabilities":
        model.gate = nn.Sequential(nn.Linear(6, 3), nn.Threshold(0, 0), nn.Hardtanh(0, 1))
        model.gate.module.register_forward_hook(lambda m, i, y: (y > 0).float() + (y - y.detach()))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = profile_fusion(model, (x,), training=training, effort=ONCE)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert model.execution == "auto"
    assert [check.execution for check in found.checks] == ["routed", "routed", "masked"]
    assert all(check.measured > 0 and check.predicted > 0 for check in found.checks)
    assert found.waits >= 1
    assert found.phases["gate"] > 0
    exact = training and kind not in ("two of three", "selected", "no gate")
    names = {*found.branches} - found.forecast.coupled
    assert {*found.forecast.rest} == (names if exact else set())
    assert found.forecast.coupled == ({"0"} if kind == "norms" and training else set())


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.7, 0.7, 0.7), (2.0, -1.0, 0.0)])
def test_shares_that_do_not_fit(shares):
    with pytest.raises(SharesError, match=r"3 numbers in 0..1, for b0, b1, b2, with the sum 1"):
        profile_fusion(fusion(), (torch.randn(ROWS, 6),), shares, effort=ONCE)


def test_a_profile_checks_other_shares():
    for model in (fusion(), fusion(select="multi_hot"), fusion(2), fusion(select=2)):
        found = profile_fusion(model, (torch.randn(ROWS, 6),), effort=ONCE)
        own, other, _ = found.checks
        assert sum(abs(a - b) for a, b in zip(own.shares, other.shares, strict=True)) > 0.1


def test_predictions_add_up_on_a_simulated_machine(monkeypatch):
    """Every call takes what a machine of fixed parts and slopes says it takes."""
    made: list[profiling._Bench] = []
    run = profiling._Bench.run
    monkeypatch.setattr(
        profiling._Bench, "run", lambda self, *args: (made.append(self), run(self, *args))[1]
    )

    def simulated(calls, effort, device, after_round):
        (bench,) = made[-1:]
        takes = {"gate": (2, 0.1), "branch b0": (3, 0.2)}
        takes |= {"branch b1": (5, 1.0), "branch b2": (7, 3.0)}

        def seconds(name: str) -> float:
            what, _, n = name.rpartition(" ")
            if what in takes:
                fixed, slope = takes[what]
                return fixed + slope * int(n)
            if what != "itself":
                return {"routed free": 9.0, "masked free": 4.0}.get(what, 1.0)
            own = planned_rows(SHARES[int(n)], bench.size).sum(0).tolist() if n != "2" else None
            total = takes["gate"][0] + takes["gate"][1] * bench.size + (3.0 if own is None else 8.0)
            for b, (fixed, slope) in enumerate([*takes.values()][1:]):
                rows = bench.size if own is None else own[b]
                total += (fixed + slope * rows) if rows else 0
            return total

        names = []
        for name, call in calls.items():
            names += [name] if callable(call) else call
        return {name: [seconds(name)] * 3 for name in names}

    monkeypatch.setattr(profiling, "interleave", simulated)
    SHARES = [(0.5, 0.3, 0.2), (0.3, 0.2, 0.5)]
    found = profile_fusion(fusion(), (torch.randn(100, 6),), SHARES[0])
    assert [check.error for check in found.checks] == pytest.approx([0, 0, 0], abs=1e-9)
    assert found.forecast.branches["b2"].line == pytest.approx((7, 3, 0))
    assert found.rounds == 3


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_as_they_say(name):
    workload = WORKLOADS[name]
    model, inputs = workload.make(2)
    assert [branch_costs(m, inputs) for m in (model.gate, *model.branches)] == [*workload.macs]
    again, same = workload.make(2)
    assert all(torch.equal(a, b) for a, b in zip(inputs, same, strict=True))
    with torch.no_grad():
        assert torch.equal(model(*inputs), again(*same))
    assert workload.ceiling(2, 4, None) > workload.ceiling(2, 4, "straight_through") > 1


@pytest.mark.parametrize("training", [False, True])
def test_a_race_checks_and_times_every_way(training):
    rows = racing.race(racing.Setting("trivial", 4, 0.5, training), effort=ONCE)
    assert [row.execution for row in rows] == [*racing.EXECUTIONS]
    assert all(row.error < 1e-4 and row.seconds > 0 for row in rows)
    assert rows[2].overhead > 0


def test_a_wrong_row_is_not_timed(monkeypatch):
    monkeypatch.setattr(racing, "_error", lambda fusion, way, *_: float(way.execution == "routed"))
    rows = racing.race(racing.Setting("trivial", 4, 0.5, False), ["routed"], effort=ONCE)
    assert [(row.execution, row.seconds is None) for row in rows] == [
        ("routed", True),
        ("masked", False),
    ]
