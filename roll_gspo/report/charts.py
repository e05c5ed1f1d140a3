"""Charts as data: series, stacked bars, and the thinning that keeps pages small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np

from roll_gspo.report.run_folder import Points

MAX_POINTS = 600
_DENSE = 200
_SMALLEST_LOG, _LARGEST = 1e-30, 1e100


class LineStyle(StrEnum):
    """Drawing style of a series."""

    LINE = "line"  # dense and noisy series become faint, and the means of equal stretches are drawn on top
    FAINT = "faint"
    DOTS = "dots"  # a line with a marker per point


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: text in legend and tooltip.
        points: at least one.
        color: index of a series color.
        style: of the line.
    """

    label: str
    points: Points
    color: int = 0
    style: LineStyle = LineStyle.LINE


@dataclass(frozen=True)
class Chart:
    """One plot with its texts.

    Attributes:
        title: above the plot.
        note: one line about the metrics.
        series: lines; later ones are drawn on top.
        log: use a logarithmic axis, which drops values that are not positive.
        band: fill the area between the first and the last series.
        wide: span two columns of the page.
    """

    title: str
    note: str
    series: tuple[Series, ...]
    log: bool = False
    band: bool = False
    wide: bool = False

    @property
    def drawable(self) -> tuple[Series, ...]:
        """Series with at least one point that the axis can show, reduced to such points."""
        kept = (Series(s.label, _drawable(s.points, self.log), s.color, s.style) for s in self.series)
        return tuple(series for series in kept if series.points)

    @property
    def num_not_positive(self) -> int:
        """Number of points that a logarithmic axis drops."""
        return sum(value <= 0 for series in self.series for _, value in series.points) if self.log else 0


@dataclass(frozen=True)
class BarLayer:
    """One layer of stacked bars.

    Attributes:
        label: text in the tooltip.
        heights: one per bar.
        color: index of a series color; None is the color of the layer of all others.
    """

    label: str
    heights: Sequence[float]
    color: int | None = None


def trailing_mean(points: Points, window: int) -> Points:
    """Return, for each point, the mean of the latest `window` points."""
    if not points:
        return []
    sums = np.convolve([value for _, value in points], np.ones(window))[: len(points)]
    counts = np.minimum(np.arange(len(points)) + 1, window)
    return [(step, mean) for (step, _), mean in zip(points, (sums / counts).tolist(), strict=True)]


def thin(points: Points, max_points: int = MAX_POINTS) -> Points:
    """Return at most `max_points` points: lowest and highest of equal stretches, so that every peak is kept."""
    if len(points) <= max_points:
        return points
    kept: Points = []
    for stretch in _stretches(points, max_points // 2):
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def stretch_means(points: Points, count: int = _DENSE // 2) -> Points:
    """Return the means of `count` equal stretches, each at the middle step of its stretch."""
    return [
        (stretch[len(stretch) // 2][0], sum(value for _, value in stretch) / len(stretch))
        for stretch in _stretches(points, count)
    ]


def is_noisy(points: Points) -> bool:
    """Return whether there are many points and the line turns at more than every fifth of them."""
    values = [value for _, value in points]
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    return len(points) > _DENSE and turns > len(points) / 5


def _stretches(points: Points, count: int) -> list[Points]:
    edges = [i * len(points) // count for i in range(count + 1)]
    return [points[a:b] for a, b in pairwise(edges)]


def _drawable(points: Points, log: bool) -> Points:
    lowest = _SMALLEST_LOG if log else -_LARGEST
    return [point for point in points if lowest < point[1] < _LARGEST]
