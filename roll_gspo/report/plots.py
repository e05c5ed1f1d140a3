"""The one path from data to plots: matplotlib in the style of the pages, written as small inline SVG.

Importing this module imports matplotlib, which takes half a second: import it inside functions of modules that a
training imports. Nothing here uses pyplot. `plot_style` holds a lock, so that threads can draw at the same time.
"""

from __future__ import annotations

import io
import json
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator

from roll_gspo.report.charts import BarLayer, Chart, LineStyle, Series, is_noisy, stretch_means, thin
from roll_gspo.report.numbers import format_number, unit_prefix
from roll_gspo.report.run_folder import Points
from roll_gspo.report.style import CARD, INK, LINE, OTHER_COLOR, PLOT_VARIABLES, SERIES_COLORS, SOFT, series_class

_STYLE: dict[Any, Any] = {  # matplotlib declares its keys as one long Literal
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # without a fixed place, matplotlib measures all tick labels once more
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": OTHER_COLOR,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.major.pad": 6.0,
    "ytick.major.pad": 6.0,
    "text.color": INK,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "figure.facecolor": CARD,
    "savefig.facecolor": CARD,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of runs and metrics may hold dollar signs
}
_LOCK = threading.RLock()
_STEPS = [1, 2, 5, 10]
_MARGIN = 0.06
# Pixels of a chart in the report.
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 200, 54, 14, 10, 24
_WIDTH, _WIDE, _FULL = 420, 872, 1328
_FONT_SIZE, _DPI = 11.0, 72
_MAX_MARKERS = 60
_MAX_BAR_WIDTH = 48


class NumberFormatter(Formatter):
    """Tick labels with as many digits as needed. The ticks of a linear axis share their unit prefix or exponent."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        """Return the label of a tick, regardless of other ticks."""
        return _tick_label(value, abs(value))

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Return the labels of all ticks of the axis."""
        assert isinstance(self.axis, Axis)
        if self.axis.get_scale() == "log":
            return [self(value) for value in values]
        low, high = self.axis.get_view_interval()
        largest = max((abs(value) for value in values if low <= value <= high), default=0.0)
        return [_tick_label(value, largest) for value in values]


class Plotter:
    """Draws the charts of a page as inline SVG with the data of their tooltips.

    Figures are reused for charts of the same size, because matplotlib spends most of its time on creating ticks.
    """

    def __init__(self) -> None:
        self._figures: dict[tuple[int, bool], Figure] = {}
        self._num_drawn = 0

    def lines(self, chart: Chart) -> str:
        """Return the plot of a chart that has something to draw."""
        series = [Series(s.label, thin(s.points), s.color, s.style) for s in chart.drawable]
        steps = [step for one in series for step, _ in one.points]
        values = [value for one in series for _, value in one.points]
        with plot_style(self._salt()):
            axes = self._axes(_WIDE if chart.wide else _WIDTH, chart.log)
            set_x_axis(axes, min(steps), max(steps), integer=True)
            set_y_axis(axes, min(values), max(values), chart.log)
            if chart.band and len(series) > 1:
                edge = [*series[0].points, *reversed(series[-1].points)]
                axes.fill(*zip(*edge, strict=True), color=_color(series[0].color), alpha=0.1, linewidth=0)
            for full, thinned in zip(chart.drawable, series, strict=True):
                _draw_series(axes, thinned, full.points)
            tooltips = [_tooltip(axes, one.label, series_class(one.color), one.points, format_number) for one in series]
            return self._finish(axes, tooltips, chart.title)

    def stacked_bars(self, title: str, steps: Sequence[int], bar_steps: int, layers: Sequence[BarLayer]) -> str:
        """Return stacked bars over steps.

        Args:
            title: description for screen readers.
            steps: first step of each bar.
            bar_steps: number of steps that a bar covers.
            layers: from the bottom up.
        """
        centers = np.array(steps) + (bar_steps - 1) / 2
        heights = np.array([layer.heights for layer in layers], dtype=np.float64)
        tops = heights.cumsum(axis=0)
        first, last = centers[0] - bar_steps / 2, centers[-1] + bar_steps / 2
        width = min(0.82 * bar_steps, _MAX_BAR_WIDTH * (last - first) / (_FULL - _LEFT - _RIGHT))

        def seconds(value: float) -> str:
            return f"{format_number(value)} s"

        with plot_style(self._salt()):
            axes = self._axes(_FULL, False)
            set_x_axis(axes, float(first), float(last), integer=True)
            set_y_axis(axes, 0.0, float(tops[-1].max()), False)
            tooltips = []
            for layer, height, top in zip(layers, heights, tops, strict=True):
                bars = _rectangles(centers, width, top - height, top)
                axes.add_patch(PathPatch(bars, facecolor=_color(layer.color), linewidth=0))
                points = list(zip(steps, height.tolist(), strict=True))
                tooltips.append(_tooltip(axes, layer.label, _class(layer.color), points, seconds, centers))
            total = list(zip(steps, tops[-1].tolist(), strict=True))
            tooltips.append(_tooltip(axes, "step", _class(None), total, seconds, centers))
            return self._finish(axes, tooltips, title)

    def _salt(self) -> str:
        """Return a different text for each plot: ids of elements must be unique on a page."""
        self._num_drawn += 1
        return str(self._num_drawn)

    def _axes(self, width: int, log: bool) -> Axes:
        """Return empty axes of this size; the caller is inside `plot_style`."""
        if (width, log) not in self._figures:
            figure = Figure((width / _DPI, _HEIGHT / _DPI), dpi=_DPI, facecolor="none")
            tall, inner = _HEIGHT - _TOP - _BOTTOM, width - _LEFT - _RIGHT
            axes = figure.add_axes((_LEFT / width, _BOTTOM / _HEIGHT, inner / width, tall / _HEIGHT))
            axes.tick_params(labelsize=_FONT_SIZE)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_label_coords(0.5, 0.5)  # there are no labels; to place them would compute all ticks again
            self._figures[width, log] = figure
        return self._figures[width, log].axes[0]

    def _finish(self, axes: Axes, tooltips: Sequence[dict[str, Any]], title: str) -> str:
        """Write the plot and empty the axes."""
        figure = axes.get_figure(root=True)
        assert figure is not None  # every plot is part of a figure
        source = svg_of(figure, title)
        for artist in [*axes.lines, *axes.patches]:
            artist.remove()
        data = json.dumps(tooltips, separators=(",", ":"))
        cursor = f'<path class="cursor" d="M0 {_TOP}V{_HEIGHT - _BOTTOM}" visibility="hidden"/>'
        return inline_svg(source, title, f'data-tooltips="{escape(data)}"', cursor)


@contextmanager
def plot_style(salt: str) -> Iterator[None]:
    """Create and draw figures in the style of the pages, one thread at a time.

    Args:
        salt: what ids in SVG are derived from: the same salt gives the same ids.
    """
    with _LOCK, matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        yield


def set_x_axis(axes: Axes, first: float, last: float, integer: bool) -> None:
    """Set limits, ticks and labels of the horizontal axis.

    Args:
        axes: of a figure whose size is final.
        first, last: values that the axis must show.
        integer: allow ticks at whole numbers only.
    """
    margin = 0.02 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    figure = axes.get_figure(root=True)
    assert figure is not None  # every plot is part of a figure
    width = figure.get_figwidth() * axes.get_position().width
    axes.xaxis.set_major_locator(MaxNLocator(max(4, round(1.5 * width)), steps=_STEPS, integer=integer))
    axes.xaxis.set_major_formatter(NumberFormatter())


def set_y_axis(axes: Axes, low: float, high: float, log: bool) -> float:
    """Set scale, limits, ticks and labels of the vertical axis, and return its lower limit.

    Args:
        axes: to set.
        low, high: values that the axis must show; positive if `log`.
        log: use a logarithmic scale.
    """
    if log:
        factor = 1.5 if high < 3 * low else 1.15
        low, high = low / factor, high * factor
        axes.set_yscale("log")
        num_decades = math.floor(math.log10(high)) - math.ceil(math.log10(low)) + 1
        locator = LogLocator(subs=(1.0,) if num_decades >= 2 else (1.0, 2.0, 5.0), numticks=7)
    else:
        is_constant = high - low <= 1e-9 * max(abs(low), abs(high))
        margin = (abs(high) * 0.05 or 0.5) if is_constant else (high - low) * _MARGIN
        # A metric that is never negative gets no axis below 0.
        low, high = (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin
        axes.set_yscale("linear")
        locator = MaxNLocator(6, steps=_STEPS)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(NumberFormatter())
    return low


def svg_of(figure: Figure, title: str) -> str:
    """Return the figure as an SVG file; the same figure gives the same text. The caller is inside `plot_style`."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None, "Title": title}
    figure.savefig(buffer, format="svg", metadata=metadata, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def inline_svg(source: str, description: str, attributes: str = "", extra: str = "") -> str:
    """Return an SVG file as an element of a page: in the page's colors and font, and as short as possible.

    Args:
        source: text that `svg_of` returned.
        description: text for screen readers.
        attributes: further attributes of the element.
        extra: elements that are drawn on top.
    """
    box = re.search(r'viewBox="[^"]+"', source)
    body = source[source.index(">", source.index("<svg")) + 1 : source.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", body, flags=re.DOTALL)
    referenced = set(re.findall(r"""(?:url\(|href=")#([^)"]+)""", body))
    body = re.sub(r"<[^>]+>", lambda tag: _short_tag(tag[0], referenced), body)
    body = re.sub(r">\s+<", "><", body)
    while (shorter := re.sub(r"<g></g>|<g/>|<defs></defs>|<defs/>", "", body)) != body:
        body = shorter
    return (
        f'<svg {box[0] if box else ""} role="img" aria-label="{escape(description)}" {attributes} '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{body.strip()}{extra}</svg>'
    )


def _tick_label(value: float, largest: float) -> str:
    """Return a label whose unit prefix or exponent fits the largest tick."""
    if value == 0 or largest == 0:
        return "0"
    if 1e-3 <= largest < 1e12:
        size, prefix = unit_prefix(largest)
        return f"{value / size:.10g}{prefix}"
    exponent = math.floor(math.log10(largest) + 1e-9)
    return f"{value / 10.0**exponent:.6g}e{exponent}"


def _short_tag(tag: str, referenced: set[str]) -> str:
    """Shorten a tag: two decimals, no ids without references, no fonts; replace colors by variables."""
    tag = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referenced else "", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    tag = re.sub(r"font-family: [^\";]*;? ?", "", tag)
    for color, variable in PLOT_VARIABLES.items():
        tag = tag.replace(color, f"var(--{variable})")
    tag = re.sub(r"-?\d+\.\d{3,}(?:e-\d+)?", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag)
    return re.sub(r"\s*\n\s*|(?<=\d) (?=[A-Z])|(?<=[MLCz]) (?=[-\d])", "", tag)


def _draw_series(axes: Axes, series: Series, all_points: Points) -> None:
    """Draw one line, and the means of equal stretches over it if it is dense and noisy."""
    noisy = series.style is LineStyle.LINE and is_noisy(all_points)
    steps, values = zip(*series.points, strict=True)
    markers = len(steps) == 1 or (series.style is LineStyle.DOTS and len(steps) <= _MAX_MARKERS)
    faint = noisy or series.style is LineStyle.FAINT
    color = _color(series.color)
    axes.plot(
        *(steps, values),
        **{"color": color, "linewidth": 1.2 if faint else 2.0, "alpha": 0.5 if faint else 1.0, "clip_on": False},
        **{"marker": "o" if markers else "", "markersize": 6.0, "markeredgecolor": CARD, "markeredgewidth": 1.0},
    )
    if noisy:
        steps, values = zip(*stretch_means(all_points), strict=True)
        axes.plot(steps, values, color=color, linewidth=2.0, clip_on=False)


def _rectangles(centers: np.ndarray, width: float, bottom: np.ndarray, top: np.ndarray) -> Path:
    """Return one path of a rectangle per bar: a patch per bar would take ten times as long to draw."""
    left, right = centers - width / 2, centers + width / 2
    corners = np.stack([left, bottom, left, top, right, top, right, bottom, left, bottom], axis=1).reshape(-1, 2)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(centers)
    return Path(corners, codes)


def _tooltip(axes: Axes, label: str, css_class: str, points: Points, text: Any, xs: Any = None) -> dict[str, Any]:
    """Return what the page's script shows for one series: (step, x in pixels, text) of each point."""
    steps = [step for step, _ in points]
    places = np.array([[x, 1.0] for x in (steps if xs is None else xs)])
    pixels = axes.transData.transform(places)[:, 0].round(1).tolist()
    readings = [[step, x, text(value)] for (step, value), x in zip(points, pixels, strict=True)]
    return {"label": label, "class": css_class, "points": readings}


def _color(index: int | None) -> str:
    return OTHER_COLOR if index is None else SERIES_COLORS[index % len(SERIES_COLORS)]


def _class(index: int | None) -> str:
    return "other" if index is None else series_class(index)
