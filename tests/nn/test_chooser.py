"""`execution="auto"` on a simulated machine: what it settles on, how soon, and what looking costs.

A way's time is a fixed part, a launch each so often, and a slope per row.
"""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import pytest

from dynmm_kernels.nn.chooser import Chooser

KIND = ("cuda", "forward")


@dataclass
class Machine:
    """A clock, and two branches behind a launch queue.

    Attributes:
        launch: seconds of a kernel launch.
        launches, slopes: of each branch; the seconds of a row.
        overhead: launches of the router.
        lag: calls until a mark is passed, as on a device that works behind the host.
    """

    launch: float = 6e-6
    launches: tuple[int, ...] = (10, 30)
    slopes: tuple[float, ...] = (1e-7, 4e-7)
    overhead: int = 12
    noise: float = 0.0
    lag: int = 0
    seed: int = 0
    now: float = 0.0
    calls: int = 0
    random: Random = field(default_factory=Random)

    def __post_init__(self):
        self.random.seed(self.seed)

    def mark(self):
        return self.now, self.calls

    def seconds(self, begin, end):
        return end[0] - begin[0] if self.calls >= end[1] + self.lag else None

    def cost(self, way, rows, counts):
        run = [rows] * len(self.launches) if way == "masked" else counts
        parts = zip(self.launches, self.slopes, run, strict=True)
        router = self.launch * self.overhead if way == "routed" else 0.0
        return router + sum(self.launch * launches + s * n for launches, s, n in parts if n)

    def best(self, rows, counts):
        return min(("routed", "masked"), key=lambda way: self.cost(way, rows, counts))

    def serve(self, chooser, rows, counts, calls=1, known=True):
        """The ways of so many calls."""
        ways = []
        for _ in range(calls):
            way, trial = chooser.choose(KIND, rows, counts if known else (), self)
            if trial is not None:
                trial.start()
            self.now += self.cost(way, rows, counts) * (1 + abs(self.random.gauss(0, self.noise)))
            if trial is not None:
                trial.stop()
                trial.close()
            self.calls += 1
            ways.append(way)
        return ways


CPU = {"launch": 2e-7, "slopes": (1e-6, 2e-5), "overhead": 200}


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    ("machine", "rows", "counts"),
    [
        ({}, 128, (64, 64)),  # an H100, bound by launches: masked
        ({}, 8192, (7897, 295)),  # rows that count: routed
        ({}, 128, (128, 0)),  # a branch that nobody chose saves its launches
        (CPU, 1, (1, 0)),
        (CPU, 32, (27, 5)),
        (CPU, 2, (1, 1)),
    ],
)
def test_it_converges_in_under_twenty_calls(machine, rows, counts, noise, lag):
    chooser, machine = Chooser(), Machine(**machine, noise=noise, lag=lag)
    ways = machine.serve(chooser, rows, counts, 200)
    assert ways[0] == "routed"  # without evidence
    assert ways[20:].count(machine.best(rows, counts)) >= 0.94 * 180
    assert ways[20:40].count(machine.best(rows, counts)) >= 16


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("overhead", [1, 8, 15, 30, 300])
def test_looking_costs_two_per_cent_at_most(overhead, noise):
    chooser, machine = Chooser(), Machine(overhead=overhead, noise=noise)
    counts = (64, 64)
    machine.serve(chooser, 128, counts, 40)
    ways = machine.serve(chooser, 128, counts, 2000)
    spent = sum(machine.cost(way, 128, counts) for way in ways)
    best = machine.cost(machine.best(128, counts), 128, counts)
    assert spent <= (1.02 + noise / 10) * 2000 * best


def test_a_way_that_is_far_behind_is_tried_rarely():
    chooser, machine = Chooser(), Machine(overhead=2000)
    machine.serve(chooser, 128, (64, 64), 20)
    assert machine.serve(chooser, 128, (64, 64), 3000).count("routed") <= 12


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_it_follows_a_change_of_load(noise):
    chooser, machine = Chooser(), Machine(noise=noise)
    counts = (4000, 96)
    assert machine.best(4096, counts) == "routed"
    assert machine.serve(chooser, 4096, counts, 300)[-100:].count("routed") >= 90
    machine.launch *= 40  # the host is busy: launches are dear
    assert machine.best(4096, counts) == "masked"
    assert machine.serve(chooser, 4096, counts, 400)[-100:].count("masked") >= 90
    machine.launch /= 40
    assert machine.serve(chooser, 4096, counts, 400)[-100:].count("routed") >= 90


def test_shares_are_told_apart():
    chooser, machine = Chooser(), Machine(launches=(4, 40), overhead=10)
    some, none = (64, 64), (128, 0)
    assert (machine.best(128, some), machine.best(128, none)) == ("masked", "routed")
    for _ in range(40):
        machine.serve(chooser, 128, some)
        machine.serve(chooser, 128, none)
    for counts in (some, none):
        ways = [machine.serve(chooser, 128, counts)[0] for _ in range(50)]
        assert ways.count(machine.best(128, counts)) >= 46


def test_what_was_not_seen_is_predicted():
    chooser, machine = Chooser(), Machine()
    for rows in (1024, 2048, 8192):
        for share in (0.125, 0.25, 0.5, 0.75):
            counts = rows - int(share * rows), int(share * rows)
            machine.serve(chooser, rows, counts, 12)
    for rows in (1500, 4096, 16384):
        counts = rows - int(0.36 * rows), int(0.36 * rows)
        _, estimates = chooser.explain(KIND, rows, counts)
        for name, known in estimates.items():
            assert known.calls == 0
            assert known.predicted == pytest.approx(machine.cost(name, rows, counts), rel=0.05)
        ways = machine.serve(chooser, rows, counts, 10)
        assert ways.count(machine.best(rows, counts)) >= 8, rows
    _, estimates = chooser.explain(KIND, 10**6, (10**6 - 1, 1))
    assert estimates["masked"].predicted is None  # nothing near was seen


def test_without_counts_the_number_of_rows_decides():
    chooser, machine = Chooser(), Machine()
    ways = machine.serve(chooser, 128, (64, 64), 60, known=False)
    assert ways[20:].count(machine.best(128, (64, 64))) >= 36


def test_a_trial_that_never_ends_is_no_evidence():
    chooser, machine = Chooser(), Machine()
    for _ in range(200):
        _, trial = chooser.choose(KIND, 128, (64, 64), machine)
        if trial is not None:
            trial.start()  # a forward whose backward never comes
    assert chooser.choose(KIND, 128, (64, 64), machine)[0] == "routed"
    assert chooser.explain(KIND, 128, (64, 64))[1]["routed"].measured is None
    assert machine.serve(chooser, 128, (64, 64), 200)[-40:].count("masked") >= 36


def test_kinds_have_nothing_to_do_with_each_other():
    chooser, machine = Chooser(), Machine()
    machine.serve(chooser, 128, (64, 64), 40)
    assert chooser.choose(("cuda", "selected"), 128, (64, 64), machine)[0] == "routed"


def test_state_is_saved_and_loaded():
    chooser, machine = Chooser(), Machine()
    machine.serve(chooser, 128, (64, 64), 40)
    state, other = chooser.state(), Chooser()
    other.load(state)
    assert other.state() == state
    assert chooser.explain(KIND, 128, (64, 64)) == other.explain(KIND, 128, (64, 64))
    assert machine.serve(other, 128, (64, 64), 30).count("masked") >= 27


@pytest.mark.parametrize("state", [{}, {"version": 2}, None, {"version": 1, "masked": 3}])
def test_another_state_is_refused(state):
    chooser, machine = Chooser(), Machine()
    machine.serve(chooser, 128, (64, 64), 10)
    before = chooser.state()
    with pytest.raises(ValueError, match=r"load_auto_state: wanted what auto_state\(\) returned"):
        chooser.load(state)
    assert chooser.state() == before


def test_memory_is_bounded():
    chooser, machine = Chooser(), Machine()
    for rows in range(1, 4000, 3):
        machine.serve(chooser, rows, (rows - rows // 3, rows // 3))
    assert len(chooser.state()["cells"]) <= 512


def test_a_choice_takes_less_than_three_microseconds():
    chooser, machine = Chooser(), Machine()
    machine.serve(chooser, 128, (64, 64), 500)
    marks = [time.thread_time()]
    for _ in range(50):
        for _ in range(400):
            chooser.choose(KIND, 128, (64, 64), machine)
        marks.append(time.thread_time())
    assert min(b - a for a, b in pairwise(marks)) / 400 < 3e-6
