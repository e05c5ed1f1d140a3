"""Charts as data: series, stacked bars, and the compressed form that the page's script draws."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

MAX_POINTS, MIN_POINTS = 2000, 200  # of a series
MAX_TOTAL_POINTS = 250_000  # of all series of a page: about 1 MB
_LARGEST = 1e100
_GZIP = 31  # zlib's number for a gzip header and the largest window


class LineStyle(StrEnum):
    """Drawing style of a series."""

    LINE = "line"  # the page smooths it
    FAINT = "faint"
    DOTS = "dots"  # a line with a marker per point
    POINTS = "points"  # markers only


@dataclass(frozen=True)
class Series:
    """One line of a chart, or one layer of its bars.

    Attributes:
        label: text in legend and tooltip.
        points: (position, value); the position is a step or an amount of x_label.
        color: index of a series color; None is the color of the layer of all others.
        style: of the line.
        low, high: edges of a band around the line, one value per point; empty if there is none.
        dash: index of a dash pattern; 0 is a solid line.
        part_of: index of the series whose entry in the legend also hides this one.
        span: number of steps that a point averages.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: int | None = 0
    style: LineStyle = LineStyle.LINE
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dash: int = 0
    part_of: int | None = None
    span: int = 1


@dataclass(frozen=True)
class Chart:
    """One plot with its texts.

    Attributes:
        title: above the plot.
        note: one line about the metrics.
        y_label: quantity and unit of the vertical axis.
        series: lines, later ones drawn on top; or layers of stacked bars from the bottom up.
        log: start with a logarithmic axis, which drops values that are not positive.
        band: fill the area between the first and the last series.
        wide: span two columns of the page.
        x_label: quantity and unit of the horizontal axis. Charts with the same one share cursor and zoom.
        bars: draw stacked bars.
    """

    title: str
    note: str
    y_label: str
    series: tuple[Series, ...]
    log: bool = False
    band: bool = False
    wide: bool = False
    x_label: str = "step"
    bars: bool = False

    @property
    def drawable(self) -> Chart | None:
        """The chart without values that cannot be drawn; None if nothing is left."""
        kept = [_drawable(series) for series in self.series]
        if not any(series.points for series in kept):
            return None
        # Without a positive value a logarithmic axis would show nothing.
        log = self.log and any(value > 0 for series in kept for _, value in series.points)
        return replace(self, series=tuple(kept), log=log)


def pack(value: Any) -> str:
    """Return `value` as base64 of gzip of JSON: text of a run cannot become HTML in it."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, _GZIP)
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return base64.b64encode(compressor.compress(text) + compressor.flush()).decode()


def pack_charts(charts: Sequence[Chart]) -> str:
    """Return charts in the form that the page's script reads. Long series become means, lows and highs of stretches."""
    num_series = max(1, sum(len(chart.series) for chart in charts))
    max_points = min(MAX_POINTS, max(MIN_POINTS, MAX_TOTAL_POINTS // num_series))
    positions: dict[tuple[float, ...], int] = {}
    packed = [
        {
            "title": chart.title,
            "y": chart.y_label,
            "x": chart.x_label,
            "log": chart.log,
            "band": chart.band,
            "bars": chart.bars,
            "series": [_packed_series(_limited(series, max_points), positions) for series in chart.series],
        }
        for chart in charts
    ]
    return pack({"positions": list(positions), "charts": packed})


def _limited(series: Series, max_points: int) -> Series:
    """Return a series of at most `max_points`, or of half of them with a band, which takes three values per point."""
    return series if len(series.points) <= max_points else averaged(series, max_points // 2)


def averaged(series: Series, max_points: int) -> Series:
    """Return a series of at most `max_points`: the mean of each stretch at its middle, its minimum and maximum."""
    count = len(series.points)
    if count <= max_points:
        return series
    size = -(-count // max_points)
    starts = np.arange(0, count, size)
    middles = np.minimum(starts + size // 2, count - 1)
    values = np.array([value for _, value in series.points])
    low, high = (np.array(edge) if len(edge) else values for edge in (series.low, series.high))
    means = np.add.reduceat(values, starts) / np.diff(np.append(starts, count))
    return replace(
        series,
        points=[(series.points[i][0], mean) for i, mean in zip(middles.tolist(), means.tolist(), strict=True)],
        low=np.minimum.reduceat(low, starts).tolist(),
        high=np.maximum.reduceat(high, starts).tolist(),
        span=series.span * size,
    )


def _packed_series(series: Series, positions: dict[tuple[float, ...], int]) -> dict[str, Any]:
    """Return a series whose positions are an index into `positions`, which most series share."""
    xs = tuple(_short(x) for x, _ in series.points)
    packed = {
        "label": series.label,
        "color": "other" if series.color is None else series.color,
        "style": series.style.value,
        "x": positions.setdefault(xs, len(positions)),
        "y": [_short(value) for _, value in series.points],
        "low": [_short(value) for value in series.low] or None,
        "high": [_short(value) for value in series.high] or None,
        "dash": series.dash or None,
        "partOf": series.part_of,
        "span": series.span if series.span > 1 else None,
    }
    return {key: value for key, value in packed.items() if value is not None}


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _drawable(series: Series) -> Series:
    kept = [i for i, (_, value) in enumerate(series.points) if math.isfinite(value) and abs(value) < _LARGEST]
    if len(kept) == len(series.points):
        return series
    low, high = ([edge[i] for i in kept] if edge else () for edge in (series.low, series.high))
    return replace(series, points=[series.points[i] for i in kept], low=low, high=high)
