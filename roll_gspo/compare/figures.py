"""Panels drawn by matplotlib: files for papers, and inline SVG that follows the page's light or dark colours."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

from roll_gspo.compare.drawings import X_LABELS, Curve, Drawing, overview_reading
from roll_gspo.compare.panels import Panel
from roll_gspo.compare.spread import Axis

# Okabe and Ito's colours (2008), which readers with any common colour blindness tell apart; without the yellow, which
# is too light for lines. Beyond seven groups they come again with other dashes.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#3c4450")
DARK_COLORS = ("#4ea8e8", "#ff8a45", "#2fc79b", "#e7a0c8", "#f2bd45", "#8fd0f7", "#c3c9d2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (6, 1.5)), (0, (3, 1.2, 1, 1.2)), (0, (1.5, 1.2)))
_INK, _SOFT, _GRID, _CARD = "#16191d", "#626a75", "#e3e6ea", "#fefefe"
VARIABLES = {
    _INK: "--ink",
    _SOFT: "--soft",
    _GRID: "--line",
    _CARD: "--card",
    **{color: f"--g{i}" for i, color in enumerate(COLORS)},
}
STYLE: dict[Any, Any] = {  # matplotlib declares its keys as one long Literal
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "axes.titlecolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "text.color": _INK,
    "legend.frameon": False,
    "figure.facecolor": _CARD,
    "savefig.facecolor": _CARD,
    "svg.fonttype": "none",
}
_WIDTH, _HEIGHT, _LEGEND_ROW = 4.4, 2.8, 0.2  # inches
_CHARACTER = 0.068  # inches, of the legend's font
_DPI = 200
_TIME_UNITS = ((3 * 3600.0, 3600.0, "h"), (90.0, 60.0, "min"), (-math.inf, 1.0, "s"))


def figure_of(drawing: Drawing) -> Figure:
    """One panel with its legend."""
    with matplotlib.rc_context(STYLE):
        columns, legend_rows = _legend_columns(drawing.curves, _WIDTH)
        reading = textwrap.wrap(drawing.reading, int(1.1 * _WIDTH / _CHARACTER))
        figure = Figure((_WIDTH, _HEIGHT + _LEGEND_ROW * (legend_rows + len(reading))), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, drawing)
        _legend(figure, axes, columns, "\n".join(reading))
        _settle(figure)
    return figure


def overview_of(drawings: Sequence[Drawing], columns: int = 3) -> Figure:
    """All panels in one figure with one legend."""
    with matplotlib.rc_context(STYLE):
        rows = -(-len(drawings) // columns)
        fullest = max(range(len(drawings)), key=lambda i: len(drawings[i].curves))
        width = 4.0 * columns
        legend_columns, legend_rows = _legend_columns(drawings[fullest].curves, width)
        reading = textwrap.wrap(overview_reading(drawings), int(1.1 * width / _CHARACTER))
        size = (width, 2.8 * rows + _LEGEND_ROW * (legend_rows + len(reading)))
        figure = Figure(size, layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09))
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, drawing in zip(grid, drawings, strict=False):
            draw(axes, drawing)
        for axes in grid[len(drawings) :]:
            axes.set_visible(False)
        _legend(figure, grid[fullest], legend_columns, "\n".join(reading))
        _settle(figure)
    return figure


def draw(axes: Axes, drawing: Drawing) -> None:
    """The curves of a panel, its title and its labelled axes."""
    panel, curves = drawing.panel, drawing.curves
    ends = [line.x[-1] for curve in curves for line in curve.spread.lines]
    unit, x_label = _x_unit(panel.axis, max(ends))
    floor = log_floor(curves) if panel.log else None
    for curve in curves:
        _draw_curve(axes, panel, curve, unit, floor)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(panel.y_label)
    if floor is not None:
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=panel.axis is not Axis.TIME))
    if panel.axis is Axis.TOKENS:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)


def log_floor(curves: Sequence[Curve]) -> float | None:
    """The lower edge of a logarithmic axis: a little below all means; None where no mean is positive."""
    drawn = [line.y for curve in curves for line in curve.spread.rest] + [curve.spread.mean for curve in curves]
    values = np.concatenate(drawn)
    positive = values[values > 0]
    if not positive.size:
        return None
    return float(positive.min()) / (1.6 if positive.max() > 3 * positive.min() else 1.1)


def write_files(figure: Figure, folder: Path, name: str) -> str:
    """Write `name.svg` and `name.png`; returns the SVG. The same figure gives the same files."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": name})
        figure.savefig(folder / f"{name}.png", dpi=_DPI, metadata={"Software": None})
    (folder / f"{name}.svg").write_text(buffer.getvalue(), encoding="utf-8")
    return buffer.getvalue()


def inline(source: str, description: str) -> str:
    """An SVG file as an element of a page, whose colours it takes; ids that nothing refers to are left out."""
    source = source[source.index("<svg") :]
    source = re.sub(r"<metadata>.*?</metadata>", "", source, flags=re.DOTALL)
    used = set(re.findall(r"""(?:url\(|href=")#([^)"]+)""", source))
    source = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", source)
    for color, variable in VARIABLES.items():
        source = source.replace(color, f"var({variable})")
    size = re.search(r'viewBox="[^"]+"', source)
    head = f'<svg {size[0] if size else ""} role="img" aria-label="{escape(description)}" '
    return head + 'xmlns:xlink="http://www.w3.org/1999/xlink">' + source[source.index(">") + 1 :]


def _settle(figure: Figure) -> None:
    """Lay out once: every file of the figure would do it again."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _draw_curve(axes: Axes, panel: Panel, curve: Curve, unit: float, floor: float | None) -> None:
    color, dash = COLORS[curve.number % len(COLORS)], _DASHES[curve.number // len(COLORS) % len(_DASHES)]
    marker, spread = MARKERS[curve.number % len(MARKERS)], curve.spread

    def shown(values: np.ndarray) -> np.ndarray:
        return values if floor is None else np.maximum(values, floor)

    single = "" if spread.x.size > 1 else marker
    axes.plot(
        *(spread.x / unit, shown(spread.mean)),
        **{"color": color, "linestyle": dash, "linewidth": 1.6, "marker": single, "label": curve.label, "zorder": 3},
    )
    if len(spread.lines) > 1:
        axes.fill_between(
            spread.x / unit, shown(spread.low), shown(spread.high), color=color, alpha=0.18, linewidth=0, zorder=2
        )
    for line in spread.rest:
        axes.plot(line.x / unit, shown(line.y), color=color, linestyle=dash, linewidth=0.8, alpha=0.7, zorder=2)
    if panel.sparse:
        for line in spread.lines:
            axes.plot(
                *(line.x / unit, shown(line.y)),
                **{"color": color, "linestyle": "none", "marker": marker, "markersize": 4.0},
                **{"markeredgecolor": _CARD, "markeredgewidth": 0.6, "alpha": 0.85, "zorder": 4},
            )


def _x_unit(axis: Axis, end: float) -> tuple[float, str]:
    """What to divide by, and the label that says so."""
    if axis is not Axis.TIME:
        return 1.0, X_LABELS[axis]
    _, unit, name = next(row for row in _TIME_UNITS if end >= row[0])
    return unit, f"{X_LABELS[axis]} ({name})"


def _legend_columns(curves: Sequence[Curve], width: float) -> tuple[int, int]:
    """How many fit into the width of the figure (inches), and how many rows that makes."""
    longest = max(len(curve.label) for curve in curves)
    columns = max(1, min(len(curves), math.floor(width / (_CHARACTER * (longest + 7)))))
    lines = max(len(_wrapped(curve.label, width / columns)) for curve in curves)
    return columns, -(-len(curves) // columns) * lines


def _wrapped(label: str, width: float) -> list[str]:
    return textwrap.wrap(label, int(width / _CHARACTER) - 7) or [label]


def _legend(figure: Figure, axes: Axes, columns: int, reading: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    width = figure.get_figwidth() / columns
    legend = figure.legend(
        *(handles, ["\n".join(_wrapped(label, width)) for label in labels]),
        **{"loc": "outside lower left", "ncols": columns, "handlelength": 1.8, "columnspacing": 1.4},
        **{"title": reading, "alignment": "left", "title_fontsize": 8.0},
    )
    legend.get_title().set_color(_SOFT)
