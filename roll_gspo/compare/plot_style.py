"""Style and axes of the plots that are written as files, with matplotlib in the colors of the pages.

Nothing here uses pyplot. `plot_style` holds a lock, so that threads can draw at the same time.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator

from roll_gspo.report.numbers import unit_prefix
from roll_gspo.report.style import CARD, INK, LINE, OTHER_COLOR, SOFT

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


def _tick_label(value: float, largest: float) -> str:
    """Return a label whose unit prefix or exponent fits the largest tick."""
    if value == 0 or largest == 0:
        return "0"
    if 1e-3 <= largest < 1e12:
        size, prefix = unit_prefix(largest)
        return f"{value / size:.10g}{prefix}"
    exponent = math.floor(math.log10(largest) + 1e-9)
    return f"{value / 10.0**exponent:.6g}e{exponent}"
