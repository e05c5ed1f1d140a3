"""Panels with the curves of the groups, and their captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from roll_gspo.compare.panels import Panel
from roll_gspo.compare.runs import Group
from roll_gspo.compare.seed_spread import Array, SeedSpread, Smoothing, XAxis, seed_spread
from roll_gspo.report.charts import Chart, LineStyle, Series
from roll_gspo.report.numbers import format_number
from roll_gspo.report.style import SERIES_COLORS

X_LABELS = {XAxis.STEPS: "training step", XAxis.TOKENS: "generated tokens", XAxis.TIME: "wall time"}
_NUM_DASHES = 4
_TIME_UNITS = ((3 * 3600.0, 3600.0, "h"), (90.0, 60.0, "min"), (-math.inf, 1.0, "s"))


@dataclass(frozen=True)
class Curve:
    """The curve of a group in a panel.

    Attributes:
        label: text in the legend.
        index: of the group; decides color, dashes and marker.
        spread: mean and range of the metric.
    """

    label: str
    index: int
    spread: SeedSpread


@dataclass(frozen=True)
class PanelCurves:
    """A panel that has at least one curve.

    Attributes:
        panel: what is drawn.
        curves: one per group that has the metric.
        caption_parts: meaning of lines, bands and dots; the first part is the same in all panels of the same runs.
    """

    panel: Panel
    curves: tuple[Curve, ...]
    caption_parts: tuple[str, ...]

    @property
    def caption(self) -> str:
        """Meaning of lines, bands and dots."""
        return "; ".join(self.caption_parts)

    @property
    def is_constant(self) -> bool:
        """True if every run has the same value at every step."""
        return len({value for curve in self.curves for line in curve.spread.lines for value in line.y.tolist()}) == 1

    @property
    def description(self) -> str:
        """Text for screen readers."""
        parts = []
        for curve in self.curves:
            spread = curve.spread
            if not spread.x.size:
                parts.append(f"{curve.label}: the runs share no step")
                continue
            low, high = format_number(spread.low[-1]), format_number(spread.high[-1])
            band = f" ({low} to {high})" if len(spread.lines) > 1 else ""
            first, last = format_number(spread.mean[0]), format_number(spread.mean[-1])
            parts.append(f"{curve.label}: from {first} to {last}{band}")
        x_label = X_LABELS[self.panel.x_axis]
        return f"{self.panel.title} against {x_label}. {'; '.join(parts)}. {self.caption.capitalize()}."


def x_unit(axis: XAxis, end: float) -> tuple[float, str]:
    """Return the divisor of a horizontal axis that ends at `end`, and its label with the unit."""
    if axis is not XAxis.TIME:
        return 1.0, X_LABELS[axis]
    _, unit, name = next(row for row in _TIME_UNITS if end >= row[0])
    return unit, f"{X_LABELS[axis]} ({name})"


def panel_chart(shown: PanelCurves) -> Chart:
    """Return a panel as an interactive chart: a line and a band per group, and the runs that differ from them."""
    panel, curves = shown.panel, shown.curves
    unit, x_label = x_unit(panel.x_axis, max(line.x[-1] for curve in curves for line in curve.spread.lines))

    def points(x: Array, y: Array) -> list[tuple[float, float]]:
        return list(zip((x / unit).tolist(), y.tolist(), strict=True))

    mains, parts = [], []
    for i, curve in enumerate(curves):
        spread = curve.spread
        dash = curve.index // len(SERIES_COLORS) % _NUM_DASHES
        low, high = (spread.low.tolist(), spread.high.tolist()) if len(spread.lines) > 1 else ((), ())
        mean = points(spread.x, spread.mean)
        mains.append(Series(curve.label, mean, curve.index, low=low, high=high, dash=dash))
        drawn = [(LineStyle.FAINT, spread.tails)] + ([(LineStyle.POINTS, spread.lines)] if panel.sparse else [])
        for style, lines in drawn:
            parts += [
                Series(f"{curve.label}, {line.run}", points(line.x, line.y), curve.index, style, dash=dash, part_of=i)
                for line in lines
            ]
    note = f"{panel.note} {shown.caption.capitalize()}.".strip()
    x_label = "step" if panel.x_axis is XAxis.STEPS else x_label
    return Chart(panel.title, note, panel.y_label, (*mains, *parts), panel.log, x_label=x_label)


def panel_curves(groups: Sequence[Group], panels: Sequence[Panel], smoothing: Smoothing) -> list[PanelCurves]:
    """Return the panels for which at least one group has values."""
    found = []
    for panel in panels:
        own = Smoothing(1 if panel.sparse else smoothing.bucket, smoothing.window if panel.smooth else 1)
        spreads = [seed_spread(group, panel.metrics, panel.x_axis, own) for group in groups]
        counts = {len(spread.lines) for spread in spreads if spread is not None}
        curves = [
            Curve(group.label if len(counts) == 1 else f"{group.label} ({group.num_runs})", index, spread)
            for index, (group, spread) in enumerate(zip(groups, spreads, strict=True))
            if spread is not None
        ]
        if curves:
            found.append(PanelCurves(panel, tuple(curves), _caption_parts(panel, groups, curves, own)))
    return found


def overview_caption(shown: Sequence[PanelCurves]) -> str:
    """Return the caption of a figure with several panels; parts that hold for some panels name their titles."""
    common = dict.fromkeys(one.caption_parts[0] for one in shown)
    titles_of_part: dict[str, dict[str, None]] = {}
    for one in shown:
        for part in one.caption_parts[1:]:
            titles_of_part.setdefault(part, {})[one.panel.title] = None
    num_titles = len({one.panel.title for one in shown})
    special = [
        part if len(titles) == num_titles else f"{', '.join(titles).lower()}: {part}"
        for part, titles in titles_of_part.items()
    ]
    return "; ".join([*common, *special])


def _caption_parts(
    panel: Panel, groups: Sequence[Group], curves: Sequence[Curve], smoothing: Smoothing
) -> tuple[str, ...]:
    counts = sorted({len(curve.spread.lines) for curve in curves})
    noun = "seed" if all(group.has_distinct_seeds for group in groups) else "run"
    if counts[-1] == 1:
        parts = [f"one {noun} each, so the spread is unknown" if len(curves) > 1 else f"one {noun}, spread unknown"]
    else:
        number = f"of {counts[0]} {noun}s" if len(counts) == 1 else f"over the {noun}s"
        parts = [f"mean {number}, band: minimum to maximum"]
    if panel.sparse and counts[-1] > 1:
        parts.append(f"dots: single {noun}s")
    if smoothing.window > 1:
        parts.append(f"trailing mean of {smoothing.window} steps")
    if smoothing.bucket > 1:
        parts.append(f"each point is the mean of {smoothing.bucket} steps")
    if any(curve.spread.tails for curve in curves):
        parts.append(f"thin lines: {noun}s with more steps than others")
    return tuple(parts)
