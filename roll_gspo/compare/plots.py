"""Draw panels with the report's plot style: one figure per panel, and an overview of all panels."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from roll_gspo.compare.curves import Curve, PanelCurves, overview_caption, x_unit
from roll_gspo.compare.panels import Panel
from roll_gspo.compare.plot_style import plot_style, set_x_axis, set_y_axis, svg_of
from roll_gspo.compare.seed_spread import XAxis
from roll_gspo.report.style import CARD, SERIES_COLORS, SOFT

# Beyond the number of colors, groups differ in dashes.
_DASHES = ("-", (0, (6, 1.5)), (0, (3, 1.2, 1, 1.2)), (0, (1.5, 1.2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH, _HEIGHT, _TEXT_ROW = 4.4, 2.8, 0.2  # inches
_CHARACTER = 0.068  # width in inches, in the legend's font
_DPI = 200


def save_panel(panel: PanelCurves, folder: Path) -> None:
    """Write a panel with its legend as SVG and PNG."""
    with plot_style(panel.panel.name):
        columns, legend_rows = _legend_size(panel.curves, _WIDTH)
        caption = _wrapped_caption(panel.caption, _WIDTH)
        figure = Figure((_WIDTH, _HEIGHT + _TEXT_ROW * (legend_rows + len(caption))), layout="constrained")
        axes = figure.add_subplot()
        _draw_panel(axes, panel)
        _draw_legend(figure, axes, columns, caption)
        _save(figure, folder, panel.panel.name)


def save_overview(panels: Sequence[PanelCurves], folder: Path, columns: int = 3) -> None:
    """Write all panels as one figure with one legend, as `overview.svg` and `overview.png`."""
    with plot_style("overview"):
        rows = -(-len(panels) // columns)
        fullest = max(range(len(panels)), key=lambda i: len(panels[i].curves))
        width = 4.0 * columns
        legend_columns, legend_rows = _legend_size(panels[fullest].curves, width)
        caption = _wrapped_caption(overview_caption(panels), width)
        size = (width, _HEIGHT * rows + _TEXT_ROW * (legend_rows + len(caption)))
        figure = Figure(size, layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09))
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        _draw_legend(figure, grid[fullest], legend_columns, caption)
        _save(figure, folder, "overview")


def _save(figure: Figure, folder: Path, name: str) -> None:
    """Lay out the figure once and write both files. The same figure gives the same files."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # otherwise each file repeats the layout
    (folder / f"{name}.svg").write_text(svg_of(figure, name), encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=_DPI, metadata={"Software": None})


def _draw_panel(axes: Axes, shown: PanelCurves) -> None:
    """Draw the curves of a panel, its title and its labelled axes."""
    panel, curves = shown.panel, shown.curves
    lines = [line for curve in curves for line in curve.spread.lines]
    unit, x_label = x_unit(panel.x_axis, max(line.x[-1] for line in lines))
    first, last = min(line.x[0] for line in lines) / unit, max(line.x[-1] for line in lines) / unit
    set_x_axis(axes, first, last, integer=panel.x_axis is not XAxis.TIME)
    values = _axis_values(panel, curves)
    positive = values[values > 0]
    log = panel.log and positive.size > 0
    shown_values = positive if log else values
    lower_limit = set_y_axis(axes, float(shown_values.min()), float(shown_values.max()), log)
    for curve in curves:
        _draw_curve(axes, panel, curve, unit, lower_limit if log else -math.inf)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(panel.y_label)


def _axis_values(panel: Panel, curves: Sequence[Curve]) -> np.ndarray:
    """Return the values that the vertical axis must show. A logarithmic axis may cut off the lower edge of bands."""
    arrays = []
    for curve in curves:
        spread = curve.spread
        arrays += [spread.mean, spread.high, *(line.y for line in spread.tails)]
        arrays += [] if panel.log else [spread.low]
        arrays += [line.y for line in spread.lines] if panel.sparse else []
    return np.concatenate(arrays)


def _draw_curve(axes: Axes, panel: Panel, curve: Curve, unit: float, lower_limit: float) -> None:
    color = SERIES_COLORS[curve.index % len(SERIES_COLORS)]
    dash = _DASHES[curve.index // len(SERIES_COLORS) % len(_DASHES)]
    marker, spread = _MARKERS[curve.index % len(_MARKERS)], curve.spread

    def shown(values: np.ndarray) -> np.ndarray:
        return np.maximum(values, lower_limit)

    axes.plot(
        *(spread.x / unit, shown(spread.mean)),
        **{"color": color, "linestyle": dash, "linewidth": 1.6, "label": _legend_label(curve.label), "zorder": 3},
        marker="" if spread.x.size > 1 else marker,
    )
    if len(spread.lines) > 1:
        low, high = shown(spread.low), shown(spread.high)
        axes.fill_between(spread.x / unit, low, high, color=color, alpha=0.18, linewidth=0, zorder=2)
    for line in spread.tails:
        axes.plot(line.x / unit, shown(line.y), color=color, linestyle=dash, linewidth=0.8, alpha=0.7, zorder=2)
    if panel.sparse:
        for line in spread.lines:
            axes.plot(
                *(line.x / unit, shown(line.y)),
                **{"color": color, "linestyle": "none", "marker": marker, "markersize": 4.0},
                **{"markeredgecolor": CARD, "markeredgewidth": 0.6, "alpha": 0.85, "zorder": 4, "clip_on": False},
            )


def _legend_label(label: str) -> str:
    """Return a label that is in the legend: matplotlib leaves out those that start with an underscore."""
    return f" {label}" if label.startswith("_") else label


def _legend_size(curves: Sequence[Curve], width: float) -> tuple[int, int]:
    """Return how many columns fit into `width` inches, and the number of rows of text."""
    longest = max(len(curve.label) for curve in curves)
    columns = max(1, min(len(curves), math.floor(width / (_CHARACTER * (longest + 7)))))
    lines = max(len(_wrapped_label(curve.label, width / columns)) for curve in curves)
    return columns, -(-len(curves) // columns) * lines


def _wrapped_label(label: str, width: float) -> list[str]:
    return textwrap.wrap(label, int(width / _CHARACTER) - 7) or [label]


def _wrapped_caption(caption: str, width: float) -> list[str]:
    return textwrap.wrap(caption, int(1.1 * width / _CHARACTER))


def _draw_legend(figure: Figure, axes: Axes, columns: int, caption: Sequence[str]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    width = figure.get_figwidth() / columns
    legend = figure.legend(
        *(handles, [_legend_label("\n".join(_wrapped_label(label, width))) for label in labels]),
        **{"loc": "outside lower left", "ncols": columns, "handlelength": 1.8, "columnspacing": 1.4},
        **{"title": "\n".join(caption), "alignment": "left", "title_fontsize": 8.5},
    )
    legend.get_title().set_color(SOFT)
