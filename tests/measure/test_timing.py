"""Who is called how often and in which order while they are timed."""

import itertools

from dynmm_kernels.measure import timing
from dynmm_kernels.measure.timing import ONCE, Effort, interleave


def test_contestants_take_turns_and_the_first_one_changes():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = interleave(calls, Effort(0.0, (4, 4), sample=0.0))
    assert {name: len(its) for name, its in seconds.items()} == {"a": 4, "b": 4}
    assert "".join(called[-8:]) == "abbaabba"


def test_a_group_runs_in_its_order_and_each_is_timed():
    called = []
    group = {name: lambda name=name: called.append(name) for name in "bc"}
    seconds = interleave({"a": lambda: called.append("a"), "group": group}, ONCE)
    assert {*seconds} == {"a", "b", "c"}
    assert all(len(its) == 1 and its[0] > 0 for its in seconds.values())
    assert "".join(called[-3:]) == "abc"


def test_a_short_call_is_repeated_untimed_before(monkeypatch):
    monkeypatch.setattr(timing, "LONG", 2.0)
    counts = {}
    for warm in (False, True):
        ticks = itertools.count()  # a clock on which every call takes one second
        monkeypatch.setattr(timing, "synced_clock", lambda device, ticks=ticks: lambda: next(ticks))
        called: list[int] = []
        effort = Effort(0.0, (1, 1), sample=10.0, warm=warm)
        seconds = interleave({"a": lambda called=called: called.append(0)}, effort)
        assert seconds == {"a": [0.1]}  # ten calls, which this clock sees as one
        counts[warm] = len(called)
    assert counts[True] == counts[False] + 9


def test_the_middle_half():
    assert timing.middle([9.0, 1.0, 3.0, 2.0]) == [2.0, 3.0]
    assert timing.middle([5.0]) == [5.0]
