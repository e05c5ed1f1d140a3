"""Charts of a page: the frame of each, the controls of all, and their data."""

from __future__ import annotations

from html import escape

from roll_gspo.report.charts import Chart, pack_charts
from roll_gspo.report.html_page import asset
from roll_gspo.report.numbers import format_number
from roll_gspo.report.style import series_class

_CONTROLS = """
<form class="controls" id="controls" hidden>
<label>Smoothing <input name="smoothing" type="range" min="0" max="0.99" step="0.01" value="{smoothing}">
<output></output></label>
<label>Charts <input name="filter" type="search" placeholder="part of a title or metric" autocomplete="off">
</label>
<button type="button" name="reset" disabled>All steps</button>
<span>Drag over a chart to zoom; click a name to hide its line.</span></form>
<noscript><p class="note">The charts need JavaScript. The numbers beside the names are the latest values.</p></noscript>
"""


class ChartCards:
    """Collect the charts of a page while its sections are built."""

    def __init__(self) -> None:
        self._charts: list[Chart] = []

    def card(self, chart: Chart, legend: str | None = None, description: str = "") -> str:
        """Return a chart with title, note and legend; empty if there is nothing to draw.

        Args:
            chart: to draw.
            legend: HTML that replaces the legend with the latest values.
            description: text for screen readers.
        """
        drawable = chart.drawable
        if drawable is None:
            return ""
        self._charts.append(drawable)
        wide = " wide" if chart.wide else ""
        label = escape(description or chart.title)
        return (
            f'<figure class="card{wide}" data-chart="{len(self._charts) - 1}" aria-label="{label}"><figcaption>'
            f'<h3>{escape(chart.title)}</h3><p>{escape(chart.note)}</p><div class="legend">'
            f'{_legend(drawable) if legend is None else legend}</div></figcaption><div class="plot"></div></figure>'
        )

    def data(self) -> str:
        """Return the element with the data of all charts."""
        return f'<data id="charts" value="{pack_charts(self._charts)}"></data>'


def controls(num_steps: int) -> str:
    """Return the controls of all charts. The more steps, the stronger the initial smoothing."""
    return _CONTROLS.format(smoothing=0.9 if num_steps >= 200 else 0.6 if num_steps >= 40 else 0)


def chart_script() -> str:
    """Return the script that draws the charts."""
    return asset("charts.js")


def key(index: int, color: int | None, style: str, text: str) -> str:
    """Return the entry of series `index` in a legend: a button that hides it. `text` is HTML."""
    css = "other" if color is None else series_class(color)
    return (
        f'<button type="button" class="key" data-series="{index}" aria-pressed="true"><i class="{css} {style}"></i>'
        f"{text}</button>"
    )


def _legend(chart: Chart) -> str:
    return "".join(
        key(i, one.color, one.style, f"{escape(one.label)} <b>{format_number(one.points[-1][1])}</b>")
        for i, one in enumerate(chart.series)
        if one.part_of is None and one.points
    )
