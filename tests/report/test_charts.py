from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_gspo.report.charts import Chart, Series, is_noisy, stretch_means, thin, trailing_mean
from roll_gspo.report.numbers import format_count, format_duration, format_number

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (0.7966, "0.7966"),
        (1.000123, "1.000123"),
        (26.4, "26.4"),
        (2310.4, "2310"),
        (123456.0, "123,456"),
        (1e-6, "1.00e-6"),
        (3.0e-4, "3.00e-4"),
    ],
)
def test_format_number_has_four_digits_and_more_close_to_one(value: float, expected: str) -> None:
    assert format_number(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.38, "0.380"), (27.849, "27.8"), (123.4, "123"), (561540.0, "561,540"), (8.68e-5, "8.68e-5"), (0.998, "0.998")],
)
def test_format_number_pads_table_cells(value: float, expected: str) -> None:
    assert format_number(value, digits=3, pad=True) == expected


def test_format_count_and_duration_choose_a_unit() -> None:
    assert [format_count(value) for value in (950.0, 561540.0, 2.5e6, 7e9)] == ["950", "562 k", "2.5 M", "7 G"]
    assert [format_duration(seconds) for seconds in (9.0, 120.0, 36000.0)] == ["9.0 s", "2.0 min", "10.0 h"]


def test_trailing_mean_averages_the_latest_points() -> None:
    assert trailing_mean([(1, 2.0), (2, 4.0), (3, 9.0)], 2) == [(1, 2.0), (2, 3.0), (3, 6.5)]
    assert trailing_mean([(1, 2.0)], 5) == [(1, 2.0)] and trailing_mean([], 5) == []


@given(st.lists(FINITE, min_size=1, max_size=300), st.integers(1, 20))
def test_thin_keeps_order_and_extremes(values: list[float], half: int) -> None:
    points = list(enumerate(values))
    kept = thin(points, 2 * half)
    assert kept == sorted(kept)
    assert len(kept) <= 2 * half
    assert {min(values), max(values)} <= {value for _, value in kept} or len(values) == 1


def test_noisy_series_turn_often_and_have_many_points() -> None:
    zigzag = [(step, float(step % 2)) for step in range(1000)]
    assert is_noisy(zigzag) and not is_noisy(zigzag[:100])
    assert not is_noisy([(step, float(step)) for step in range(1000)])
    assert stretch_means(zigzag, 2) == [(250, 0.5), (750, 0.5)]


def test_log_chart_drops_and_counts_values_that_are_not_positive() -> None:
    chart = Chart("Clip fraction", "", (Series("tokens", [(1, 0.0), (2, 0.1), (3, -0.2)]),), log=True)
    assert [series.points for series in chart.drawable] == [[(2, 0.1)]]
    assert chart.num_not_positive == 2
    assert Chart("x", "", (Series("a", [(1, 0.0)]),), log=True).drawable == ()
