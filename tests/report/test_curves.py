from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_gspo.report.curves import (
    Chart,
    Series,
    chart_card,
    figure,
    log_ticks,
    step_ticks,
    thin,
    tick_label,
    ticks,
    trailing_mean,
)

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@given(FINITE, st.floats(1e-9, 1e9))
def test_ticks_are_few_evenly_spaced_and_inside(low: float, spread: float) -> None:
    high = low + spread
    if high - low < 1e-7 * abs(low):
        return
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    gap = found[1] - found[0]
    assert low - 1e-6 * gap <= found[0] and found[-1] <= high + 1e-6 * gap


def test_ticks_are_round() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert log_ticks(0.0005, 2.0) == pytest.approx([0.001, 0.01, 0.1, 1.0])
    assert log_ticks(0.04, 0.3) == pytest.approx([0.05, 0.1, 0.2])
    assert step_ticks(1, 3) == [1, 2, 3]
    assert step_ticks(7, 7) == [7]


def test_tick_labels_tell_neighbours_apart() -> None:
    for places in ([0.9999, 1.0, 1.0001], [1e-6, 1.5e-6, 2e-6], [2.40e-5, 2.45e-5], [10000.0, 12000.0]):
        labels = [tick_label(v, places[1] - places[0]) for v in places]
        assert len(set(labels)) == len(places), labels


def test_figure_is_short_and_exact_enough() -> None:
    values = (0.0, 0.7966, 1.000123, 26.4, 2310.4, 123456.0, 1e-6, 3.0e-4)
    expected = ["0", "0.7966", "1.000123", "26.4", "2310", "123,456", "1.00e-6", "3.00e-4"]
    assert [figure(v) for v in values] == expected


def test_trailing_mean_looks_back_only() -> None:
    assert trailing_mean([(1, 2.0), (2, 4.0), (3, 9.0)], 2) == [(1, 2.0), (2, 3.0), (3, 6.5)]


@given(st.lists(FINITE, min_size=1, max_size=300), st.integers(1, 20))
def test_thin_keeps_order_and_extremes(values: list[float], buckets: int) -> None:
    points = list(enumerate(values))
    kept = thin(points, buckets)
    assert kept == sorted(kept)
    assert len(kept) <= max(2 * buckets, 1)
    assert {min(values), max(values)} <= {value for _, value in kept}


def test_chart_log_axis_says_what_it_leaves_out() -> None:
    chart = Chart("Clip fraction", "Share.", (Series("tokens", [(1, 0.0), (2, 0.1), (3, 0.2)], 1),), log=True)
    card = chart_card(chart)
    assert "1 values that are not positive are not drawn" in card
    assert chart_card(Chart("x", "", (Series("a", [(1, 0.0)], 1),), log=True)) == ""


@given(
    st.lists(st.one_of(FINITE, st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=40),
    st.booleans(),
    st.sampled_from(["line", "faint", "dots"]),
)
def test_chart_draws_whatever_is_finite(values: list[float], log: bool, style: str) -> None:
    card = chart_card(Chart("t", "n", (Series("s", list(enumerate(values)), 1, style),), log, band=True))
    assert "nan" not in card and "inf" not in card
