from __future__ import annotations

import json
import re
import threading
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from roll_gspo.report.charts import BarLayer, Chart, LineStyle, Series
from roll_gspo.report.plots import Plotter, plot_style, set_x_axis, set_y_axis

PLOTTER = Plotter()
VALUES = st.one_of(st.floats(-1e9, 1e9), st.floats(-1e99, 1e99, allow_nan=False))


def y_axis(low: float, high: float, log: bool = False) -> tuple[list[float], list[str]]:
    """Return the ticks inside the limits, and their labels."""
    with plot_style("test"):
        axes = Figure((5.8, 2.8)).add_subplot()
        set_y_axis(axes, low, high, log)
        labels = axes.yaxis.get_major_formatter().format_ticks(axes.get_yticks())
        pairs = zip(axes.get_yticks(), labels, strict=True)
        limits = axes.get_ylim()
        found = [(tick, label) for tick, label in pairs if limits[0] <= tick <= limits[1]]
    return [tick for tick, _ in found], [label for _, label in found]


def data_of(svg: str) -> list[dict]:
    return json.loads(ElementTree.fromstring(svg).attrib["data-tooltips"])


def without_ids(svg: str) -> str:
    return re.sub(r'(#|id=")\w+', "", svg)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
@settings(max_examples=50)
def test_ticks_of_linear_axes_are_few_and_their_labels_differ(low: float, spread: float) -> None:
    high = low + spread
    if high - low < 1e-6 * abs(low):
        return
    ticks, labels = y_axis(low, high)
    assert 2 <= len(ticks) <= 7 and len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 1.0, False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (0.0, 2e-4, False, ["0", "0.5e-4", "1e-4", "1.5e-4", "2e-4"]),
        (0.0, 40000.0, False, ["0", "10k", "20k", "30k", "40k"]),
        (0.9999, 1.0001, False, ["0.9999", "0.99995", "1", "1.00005", "1.0001"]),
        (-2.0, 2.0, False, ["-2", "-1", "0", "1", "2"]),
        (0.0, 0.0, False, ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]),
        (1e-5, 2.0, True, ["1e-5", "1e-4", "0.001", "0.01", "0.1", "1"]),
        (0.04, 0.3, True, ["0.05", "0.1", "0.2"]),
    ],
)
def test_tick_labels(low: float, high: float, log: bool, expected: list[str]) -> None:
    assert y_axis(low, high, log)[1] == expected


def test_step_ticks_are_whole_numbers() -> None:
    with plot_style("test"):
        axes = Figure((5.8, 2.8)).add_subplot()
        set_x_axis(axes, 1, 3, integer=True)
        assert all(tick == int(tick) for tick in axes.get_xticks())


@given(st.lists(VALUES, min_size=1, max_size=40), st.booleans(), st.sampled_from(list(LineStyle)))
@settings(max_examples=40, deadline=None)
def test_charts_of_any_finite_values_are_drawn(values: list[float], log: bool, style: LineStyle) -> None:
    chart = Chart("t", "n", (Series("s", list(enumerate(values)), 0, style),), log, band=True)
    if not chart.drawable:
        return
    svg = PLOTTER.lines(chart)
    ElementTree.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize("wide", [False, True])
def test_tooltips_have_the_place_and_value_of_each_point(wide: bool) -> None:
    chart = Chart("Score", "", (Series("a", [(1, 0.5), (2, 0.25), (5, 0.75)], 3),), wide=wide)
    svg = PLOTTER.lines(chart)
    width = float(ElementTree.fromstring(svg).attrib["viewBox"].split()[2])
    (series,) = data_of(svg)
    assert (series["label"], series["class"]) == ("a", "c3")
    steps, places, texts = zip(*series["points"], strict=True)
    assert (steps, texts) == ((1, 2, 5), ("0.5", "0.25", "0.75"))
    assert 50 < places[0] < places[1] < places[2] < width
    assert places[2] - places[1] == pytest.approx(3 * (places[1] - places[0]), abs=0.5)


def test_stacked_bars_have_a_layer_per_stage_and_the_total() -> None:
    layers = [BarLayer("update", [1.0, 2.0], 0), BarLayer("other", [0.5, 0.0])]
    svg = PLOTTER.stacked_bars("Stage times", [1, 11], 10, layers)
    update, other, total = data_of(svg)
    assert [series["class"] for series in (update, other, total)] == ["c0", "other", "other"]
    assert [point[2] for point in total["points"]] == ["1.5 s", "2 s"]
    assert "var(--c0)" in svg and "var(--other)" in svg


def test_a_reused_figure_keeps_nothing_of_the_chart_before() -> None:
    one = Chart("one", "", (Series("a", [(1, 0.5), (2, 0.25)]),))
    other = Chart("other", "", (Series("b", [(10, 500.0), (2000, 900.0)], 2, LineStyle.DOTS),), band=True)
    reused = Plotter()
    found = [reused.lines(chart) for chart in (one, other, one)]
    expected = [Plotter().lines(chart) for chart in (one, other, one)]
    assert [without_ids(svg) for svg in found] == [without_ids(svg) for svg in expected]
    ids = [element_id for svg in found for element_id in set(re.findall(r'id="(\w+)"', svg))]
    assert len(ids) == len(set(ids))


def test_plots_take_the_colors_and_the_font_of_the_page() -> None:
    svg = PLOTTER.lines(Chart("Score", "", (Series("a", [(1, 0.5), (2, 0.25)], 1),)))
    assert "var(--c1)" in svg and "var(--line)" in svg and "var(--soft)" in svg
    assert not re.findall(r"#[0-9a-f]{6}|font-family", svg)
    assert len(svg) < 4000


def test_threads_draw_at_the_same_time() -> None:
    charts = [Chart(f"{i}", "", (Series("a", [(step, step * i) for step in range(20)], i),)) for i in range(1, 5)]
    expected = [Plotter().lines(chart) for chart in charts]
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i, chart=chart: found.update({i: Plotter().lines(chart)}))
        for i, chart in enumerate(charts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(charts))] == expected
