"""The arithmetic of a forecast, on machines that are simulated."""

from itertools import pairwise

import pytest

from dynmm_kernels.measure.forecast import Curve, Forecast, Line, with_share

SIZES = (1, 8, 32, 64, 128)


def straight(fixed: float, slope: float, sizes=SIZES) -> Curve:
    return Curve(tuple((n, fixed + slope * n) for n in sizes))


def machine(routing: float = 5.0, blend: float = 2.0, **more) -> Forecast:
    """Cheap: 1 + 0.1 n, costly: 10 + 1 n, the gate 1 + 0.01 n."""
    branches = {"cheap": straight(1, 0.1), "costly": straight(10, 1)}
    parts = straight(1, 0.01), branches, straight(routing, 0), straight(blend, 0)
    return Forecast(*parts, **more)


def test_a_line_is_found():
    line = Line.through([(n, 3 + 0.25 * n) for n in SIZES])
    assert line == pytest.approx((3, 0.25, 0))


@pytest.mark.parametrize("points", [[(4, 2.0)], [(1, 5.0), (8, 4.0), (64, 3.0)], [(2, 1.0)] * 3])
def test_a_line_never_falls_below_zero(points):
    line = Line.through(points)
    assert line.fixed >= 0
    assert line.slope >= 0


def test_a_line_through_a_parabola_has_no_negative_part():
    line = Line.through([(n, float(n * n)) for n in SIZES])
    assert line.fixed == 0
    assert line.slope > 0
    assert line.deviation > 0.5


def test_a_straight_curve_is_its_line_and_no_rows_take_no_time():
    curve = straight(3, 0.25)
    assert curve.is_straight
    assert curve(0) == 0
    assert curve(0.5) == pytest.approx(0.5 * 3 + 0.5 * 0.25)
    assert [curve(n) for n in (1, 50, 1000)] == pytest.approx([3.25, 15.5, 253])


def test_a_bent_curve_goes_through_its_points():
    points = ((1, 10.0), (8, 10.0), (32, 40.0), (64, 50.0))
    curve = Curve(points)
    assert not curve.is_straight
    assert [curve(n) for n, _ in points] == [t for _, t in points]
    assert curve(20) == pytest.approx(25)
    assert curve(164) == pytest.approx(50 + 100 * curve.line.slope)


def test_masked_and_routed_are_sums_of_their_parts():
    forecast = machine()
    assert forecast.masked(100) == pytest.approx(2 + 11 + 110 + 2)
    assert forecast.routed(100, (0.75, 0.25)) == pytest.approx(2 + 5 + 8.5 + 35)
    assert forecast.routed(100, (1, 0)) == pytest.approx(2 + 5 + 11)


def test_the_rest_runs_forward_only_and_coupled_branches_run_on_all():
    rest = {"cheap": straight(0.5, 0.05), "costly": straight(4, 0.4)}
    forecast = machine(rest=rest)
    expected = 2 + 5 + 8.5 + 35 + (0.5 + 0.05 * 25) + (4 + 0.4 * 75)
    assert forecast.routed(100, (0.75, 0.25)) == pytest.approx(expected)
    coupled = machine(rest={"cheap": rest["cheap"]}, coupled=frozenset({"costly"}))
    assert coupled.routed(100, (0.75, 0.25)) == pytest.approx(2 + 5 + 8.5 + 110 + 1.75)


def test_break_even_share():
    forecast = machine(routing=40)
    assert forecast.costly == 1
    share = forecast.even_share(100, (0.9, 0.1))
    assert forecast.speedup(100, (1 - share, share)) == pytest.approx(1, abs=1e-3)
    assert forecast.speedup(100, (0.9, 0.1)) > 1
    assert machine(routing=1e6).even_share(100, (0.9, 0.1)) is None
    assert machine(routing=0).even_share(100, (0.9, 0.1)) == 1


def test_break_even_batch():
    forecast = machine(routing=40)
    batch = forecast.even_batch((0.5, 0.5), 10_000)
    assert forecast.speedup(batch, (0.5, 0.5)) > 1
    assert forecast.speedup(0.8 * batch, (0.5, 0.5)) < 1
    assert machine(routing=1e6).even_batch((0.5, 0.5), 1000) is None
    assert machine(routing=0).even_batch((0.9, 0.1), 1000) == 1


def test_speed_up_falls_with_the_share_of_the_costly_branch():
    curve = machine().by_share(100, (0.9, 0.1))
    assert [share for share, _ in curve] == [i / 100 for i in range(101)]
    assert all(a > b for (_, a), (_, b) in pairwise(curve[1:-1]))


def test_with_share():
    assert with_share((0.5, 0.3, 0.2), 2, 0.6) == pytest.approx([0.25, 0.15, 0.6])
    assert with_share((0.0, 0.0, 1.0), 2, 0.5) == pytest.approx([0.25, 0.25, 0.5])
    assert with_share((1.0, 0.5, 0.5), 0, 0.2) == pytest.approx([0.2, 0.9, 0.9])
    assert with_share((0.2, 0.9), 0, 0.7, several=True) == [0.7, 0.9]
    assert with_share((1.0, 1.0), 0, 0.5) is None  # two branches each of two
