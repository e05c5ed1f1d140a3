from __future__ import annotations

import base64
import gzip
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roll_gspo.report.charts import Chart, Series, averaged, pack_charts
from roll_gspo.report.distributions import distribution_charts
from roll_gspo.report.embedded import StepValues
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


def unpacked(*charts: Chart) -> dict[str, Any]:
    return json.loads(gzip.decompress(base64.b64decode(pack_charts(charts))))


def line(values: Sequence[float], **changes: Any) -> Series:
    return Series("s", list(enumerate(values)), **changes)


def test_charts_are_packed_with_shared_positions() -> None:
    one = Chart("Score", "note", "mean", (line([0.5, 0.25]), line([1.0, 1 / 3], color=None, dash=2)), log=True)
    data = unpacked(one, Chart("Other", "", "x", (line([7.0]),)))
    assert data["positions"] == [[0, 1], [0]]
    first, second = data["charts"]
    assert first | {"series": []} == {
        **{"title": "Score", "y": "mean", "x": "step", "log": True, "band": False, "bars": False, "series": []}
    }
    assert first["series"][0] == {"label": "s", "color": 0, "style": "line", "x": 0, "y": [0.5, 0.25]}
    assert first["series"][1] == first["series"][0] | {"color": "other", "y": [1, 0.3333333], "dash": 2}
    assert second["series"][0]["x"] == 1


@given(st.lists(FINITE, min_size=1, max_size=300), st.integers(1, 40))
def test_averaged_series_keep_order_means_and_extremes(values: list[float], max_points: int) -> None:
    found = averaged(line(values), max_points)
    steps = [step for step, _ in found.points]
    assert len(steps) <= max_points and steps == sorted(set(steps)) and set(steps) <= set(range(len(values)))
    if len(values) <= max_points:
        assert found == line(values)
        return
    assert (min(found.low), max(found.high)) == (min(values), max(values))
    assert [value for _, value in found.points] == pytest.approx(
        [statistics.fmean(values[i : i + found.span]) for i in range(0, len(values), found.span)], rel=1e-6, abs=1e-3
    )


def test_bands_are_averaged_by_their_edges() -> None:
    found = averaged(line([1.0, 3.0, 5.0, 7.0], low=[0.0, 2.0, 4.0, 6.0], high=[2.0, 4.0, 6.0, 8.0]), 2)
    assert found == Series("s", [(1, 2.0), (3, 6.0)], low=[0.0, 4.0], high=[4.0, 8.0], span=2)


def test_long_series_share_the_limit_of_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roll_gspo.report.charts.MAX_TOTAL_POINTS", 1800)
    data = unpacked(*(Chart(f"{i}", "", "y", (line(range(300)), line(range(301)), line(range(601)))) for i in (1, 2)))
    found = [(len(one["y"]), one.get("span", 1), "low" in one) for one in data["charts"][1]["series"]]
    assert found == [(300, 1, False), (101, 3, True), (121, 5, True)], "each may have 300 points, or 150 with a band"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e101])
def test_values_that_cannot_be_drawn_are_left_out(value: float) -> None:
    chart = Chart("x", "", "y", (line([1.0, value, 3.0], low=[0.0, 1.0, 2.0], high=[2.0, 3.0, 4.0]),)).drawable
    assert chart is not None
    assert chart.series == (Series("s", [(0, 1.0), (2, 3.0)], low=[0.0, 2.0], high=[2.0, 4.0]),)
    assert Chart("x", "", "y", (line([value]),)).drawable is None


def test_logarithmic_chart_without_positive_values_is_linear() -> None:
    log = [Chart("x", "", "y", (line([0.0, value]),), log=True).drawable for value in (0.1, 0.0)]
    assert [chart is not None and chart.log for chart in log] == [True, False]


def test_distributions_have_quantiles_of_each_step() -> None:
    steps = [StepValues(1, [float(i) for i in range(11)], [5.0]), StepValues(4, [], [7.0, 9.0])]
    scores, lengths = distribution_charts(steps)
    low, high, median = scores.series
    assert (low.points, median.points, high.points) == ([(1, 0.0)], [(1, 5.0)], [(1, 10.0)])
    assert (median.low, median.high) == ([1.0], [9.0])
    assert lengths.series[2].points == [(1, 5.0), (4, 8.0)]
    assert distribution_charts([]) == []
