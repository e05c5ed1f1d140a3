"""Charts as inline SVG: no script is needed to see them; a script adds the reading at the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from roll_gspo.report.run_folder import Points

HEIGHT = 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 10, 24
_MAX_BUCKETS = 300
_MAX_DOTS = 60
_DENSE = 200
_TINY, _HUGE = 1e-30, 1e100


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: in legend and readings.
        points: at least one.
        color: 1 to 8, of the page's palette.
        style: `line` (where it is dense and noisy: thin, with its course drawn over it), `faint` (a thin
            one), or `dots` (points joined by a line).
    """

    label: str
    points: Points
    color: int
    style: str = "line"


@dataclass(frozen=True)
class Chart:
    """A card with one plot.

    Attributes:
        title: of the card.
        note: one line about what is seen.
        series: what is drawn; later ones on top.
        log: a logarithmic axis; values that are not positive are not drawn.
        band: fill between the first and the last series.
        wide: takes two columns.
    """

    title: str
    note: str
    series: tuple[Series, ...]
    log: bool = False
    band: bool = False
    wide: bool = False


def trailing_mean(points: Points, window: int) -> Points:
    """At each point the mean of the latest `window` points."""
    smooth: Points = []
    for i, (step, _) in enumerate(points):
        recent = [value for _, value in points[max(0, i + 1 - window) : i + 1]]
        smooth.append((step, sum(recent) / len(recent)))
    return smooth


def thin(points: Points, buckets: int = _MAX_BUCKETS) -> Points:
    """Few enough points to draw: lowest and highest of equal stretches, so that no peak is lost."""
    if len(points) <= 2 * buckets:
        return points
    kept: Points = []
    for i in range(buckets):
        stretch = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def course(points: Points, buckets: int = _DENSE // 2) -> Points:
    """Means of equal stretches, each at the middle of its stretch: what a noisy line does on the whole."""
    means: Points = []
    for i in range(buckets):
        stretch = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        means.append((stretch[len(stretch) // 2][0], sum(value for _, value in stretch) / len(stretch)))
    return means


def is_noisy(points: Points) -> bool:
    """Too many points to see a line that turns at more than every fifth of them."""
    values = [value for _, value in points]
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    return len(points) > _DENSE and turns > len(points) / 5


def chart_card(chart: Chart) -> str:
    """The chart with title, legend and latest values as HTML; empty where there is nothing to draw."""
    drawn = [Series(s.label, _drawable(s.points, chart.log), s.color, s.style) for s in chart.series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    legend = "".join(
        f'<span class="key"><i class="c{s.color} {s.style}"></i>{escape(s.label)} '
        f"<b>{figure(s.points[-1][1])}</b></span>"
        for s in drawn
    )
    hidden = sum(len(a.points) - len(_drawable(a.points, chart.log)) for a in chart.series) if chart.log else 0
    note = chart.note + (f" {hidden} values that are not positive are not drawn." if hidden else "")
    return (
        f'<figure class="card{" wide" if chart.wide else ""}"><figcaption><h3>{escape(chart.title)}</h3>'
        f'<p>{escape(note)}</p><div class="legend">{legend}</div></figcaption>{_plot(chart, drawn)}</figure>'
    )


def figure(value: float) -> str:
    """A number as one reads it: four significant digits, more next to 1, powers of ten where needed."""
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        return f"{value:,.0f}"
    if 0 < abs(value - 1) < 5e-3:
        return f"{value:.6f}".rstrip("0")
    if abs(value) < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high` (1, 2 or 5 times a power of ten apart)."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    size = min((m * power for m in (1, 2, 5, 10)), key=lambda m: abs(math.log(m / raw)))
    first = math.ceil(low / size - 1e-9)
    return [i * size for i in range(first, math.floor(high / size + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 times them where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [10.0**e for e in exponents if low <= 10.0**e <= high]
    if len(inside) < 2:
        inside = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return inside[:: max(1, math.ceil(len(inside) / 6))]


def tick_label(value: float, step: float) -> str:
    """Just the digits that tell neighbouring ticks apart."""
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if abs(value) < 1e-3 and step < 1e-3:
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9))
        return f"{value:.{digits}e}".replace("e-0", "e-")
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _drawable(points: Points, log: bool) -> Points:
    """Points within what can be scaled: beyond that, a figure is as good as infinite (or as 0)."""
    return [p for p in points if (p[1] > _TINY if log else True) and abs(p[1]) < _HUGE]


def _scales(chart: Chart, series: Sequence[Series], width: int) -> tuple[Callable, Callable, list, list, list]:
    """x and y of the drawing, x ticks, and y ticks with their labels."""
    xs = [p[0] for s in series for p in s.points]
    ys = [p[1] for s in series for p in s.points]
    first, last = min(xs), max(xs)
    low, high = min(ys), max(ys)
    if chart.log:
        low, high = (low / 1.5, high * 1.5) if high < 3 * low else (low / 1.15, high * 1.15)
        y_ticks = log_ticks(low, high)
        labels = [tick_label(v, v) for v in y_ticks]
    else:
        flat = high - low <= 1e-9 * max(abs(low), abs(high))
        margin = (abs(high) * 0.05 or 0.5) if flat else (high - low) * 0.06
        # A figure that is never negative gets no axis below 0.
        low, high = (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin
        y_ticks = ticks(low, high)
        labels = [tick_label(v, y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else abs(v)) for v in y_ticks]
    inner, tall = width - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def x_of(step: float) -> float:
        return _LEFT + (inner * (step - first) / (last - first) if last > first else inner / 2)

    def y_of(value: float) -> float:
        if chart.log:
            part = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        else:
            part = (value - low) / (high - low)
        return _TOP + tall * (1 - part)

    return x_of, y_of, step_ticks(first, last), y_ticks, labels


def step_ticks(first: int, last: int) -> list[int]:
    """Whole steps for the horizontal axis."""
    if last == first:
        return [first]
    return [int(t) for t in ticks(first, last, 6) if t == int(t)]


def _plot(chart: Chart, series: Sequence[Series]) -> str:
    width = 872 if chart.wide else 420
    x_of, y_of, x_ticks, y_ticks, labels = _scales(chart, series, width)
    parts = [
        axes(
            width,
            [(x_of(t), str(t)) for t in x_ticks],
            [(y_of(v), label) for v, label in zip(y_ticks, labels, strict=True)],
        )
    ]
    drawn = [thin(s.points) for s in series]
    if chart.band and len(series) > 1:
        edge = [(x_of(a), y_of(b)) for a, b in drawn[0]] + [(x_of(a), y_of(b)) for a, b in reversed(drawn[-1])]
        parts.append(f'<path class="band c{series[0].color}" d="{_path(edge)}Z"/>')
    for one, points in zip(series, drawn, strict=True):
        places = [(x_of(a), y_of(b)) for a, b in points]
        noisy = one.style == "line" and is_noisy(one.points)
        if len(places) > 1:
            style = "faint" if noisy else one.style
            parts.append(f'<path class="{style} c{one.color}" d="{_path(places)}"/>')
        if noisy:
            smooth = [(x_of(a), y_of(b)) for a, b in course(one.points)]
            parts.append(f'<path class="line c{one.color}" d="{_path(smooth)}"/>')
        if len(places) == 1 or (one.style == "dots" and len(places) <= _MAX_DOTS):
            parts += [f'<circle class="c{one.color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    readings = [
        {
            "l": s.label,
            "c": s.color,
            "p": [[a, round(x_of(a), 1), round(y_of(b), 1), figure(b)] for a, b in points],
        }
        for s, points in zip(series, drawn, strict=True)
    ]
    return svg(width, "".join(parts), readings, chart.title)


def axes(width: int, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> str:
    """Horizontal grid lines and the labels of both axes at (place, text)."""
    right, bottom = width - _RIGHT, HEIGHT - _BOTTOM
    parts = [f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>' for y, _ in y_ticks]
    parts += [f'<text x="{_LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">{t}</text>' for y, t in y_ticks]
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts += [f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{t}</text>' for x, t in x_ticks]
    return "".join(parts)


def svg(width: int, body: str, readings: Sequence[dict], title: str) -> str:
    """The drawing with the data that the pointer reads."""
    data = escape(json.dumps(readings, separators=(",", ":")))
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}" data-readings="{data}">'
        f'{body}<path class="cursor" d="M0 {_TOP}V{HEIGHT - _BOTTOM}" visibility="hidden"/></svg>'
    )


def stacked_bars(steps: Sequence[int], layers: Sequence[tuple[str, int, Sequence[float]]]) -> str:
    """Bars over steps as SVG; layers are (label, color, height at each step), from the bottom up."""
    width = 1328
    totals = [sum(values[i] for _, _, values in layers) for i in range(len(steps))]
    high = max(totals) * 1.05 or 1.0
    inner, tall = width - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    slot = inner / len(steps)
    bar = min(max(slot * 0.82, slot - 3), 48.0)
    y_ticks = ticks(0.0, high)
    places = [(_TOP + tall * (1 - v / high), tick_label(v, y_ticks[1])) for v in y_ticks]
    centers = [_LEFT + slot * (i + 0.5) for i in range(len(steps))]
    every = max(1, math.ceil(len(steps) / 20))
    parts = [axes(width, [(centers[i], str(steps[i])) for i in range(0, len(steps), every)], places)]
    floor = [0.0] * len(steps)
    readings = []
    for label, color, values in layers:
        rectangles = []
        for i, value in enumerate(values):
            top, tall_i = _TOP + tall * (1 - (floor[i] + value) / high), tall * value / high
            floor[i] += value
            if tall_i > 0.05:
                rectangles.append(f"M{centers[i] - bar / 2:.1f} {top:.1f}h{bar:.1f}v{tall_i:.1f}h-{bar:.1f}z")
        parts.append(f'<path class="bar c{color}" d="{"".join(rectangles)}"/>')
        points = [[s, round(x, 1), -9, f"{figure(v)} s"] for s, x, v in zip(steps, centers, values, strict=True)]
        readings.append({"l": label, "c": color, "p": points})
    readings.append(
        {
            "l": "step",
            "c": 0,
            "p": [[s, round(x, 1), -9, f"{figure(t)} s"] for s, x, t in zip(steps, centers, totals, strict=True)],
        }
    )
    return svg(width, "".join(parts), readings, "time of each step")


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
