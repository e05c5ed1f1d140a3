from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from roll_gspo.compare.plot_style import plot_style, set_x_axis, set_y_axis


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
