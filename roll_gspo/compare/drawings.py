"""Panels with the curves that runs give them, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from roll_gspo.compare.panels import Panel
from roll_gspo.compare.runs import Group
from roll_gspo.compare.spread import Axis, Resolution, Spread, spread
from roll_gspo.report.curves import figure as digits

X_LABELS = {Axis.STEPS: "training step", Axis.TOKENS: "generated tokens", Axis.TIME: "wall time"}


@dataclass(frozen=True)
class Curve:
    """A group's part of a panel.

    Attributes:
        label: in the legend.
        number: of the group; decides colour, dashes and marker.
        spread: what is drawn.
    """

    label: str
    number: int
    spread: Spread


@dataclass(frozen=True)
class Drawing:
    """A panel that has something to show.

    Attributes:
        panel: what is drawn.
        curves: one a group that has the metric, at least one.
        readings: what lines, bands and dots are; the first holds for all panels of the same runs.
    """

    panel: Panel
    curves: tuple[Curve, ...]
    readings: tuple[str, ...]

    @property
    def reading(self) -> str:
        """What lines, bands and dots are."""
        return "; ".join(self.readings)

    @property
    def num_not_positive(self) -> int:
        """Means that a logarithmic axis cannot show."""
        return sum(int((curve.spread.mean <= 0).sum()) for curve in self.curves) if self.panel.log else 0

    @property
    def is_constant(self) -> bool:
        """Whether every run has the same figure all the time."""
        return len({value for curve in self.curves for one in curve.spread.lines for value in one.y.tolist()}) == 1

    @property
    def description(self) -> str:
        """For those who do not see it."""
        told = []
        for curve in self.curves:
            seen = curve.spread
            if not seen.x.size:
                told.append(f"{curve.label}: its runs share no step")
                continue
            band = f" ({digits(seen.low[-1])} to {digits(seen.high[-1])})" if len(seen.lines) > 1 else ""
            told.append(f"{curve.label}: from {digits(seen.mean[0])} to {digits(seen.mean[-1])}{band}")
        return (
            f"{self.panel.title} against {X_LABELS[self.panel.axis]}. {'; '.join(told)}. {self.reading.capitalize()}."
        )


def drawings(groups: Sequence[Group], panels: Sequence[Panel], seen: Resolution) -> list[Drawing]:
    """The panels that some group has figures for."""
    found = []
    for panel in panels:
        own = Resolution(1 if panel.sparse else seen.stretch, seen.window if panel.smooth else 1)
        spreads = [spread(group, panel.metrics, panel.axis, own) for group in groups]
        counts = {len(one.lines) for one in spreads if one is not None}
        curves = [
            Curve(group.label if len(counts) == 1 else f"{group.label} ({group.num_runs})", number, one)
            for number, (group, one) in enumerate(zip(groups, spreads, strict=True))
            if one is not None
        ]
        if curves:
            found.append(Drawing(panel, tuple(curves), _readings(panel, groups, curves, own)))
    return found


def overview_reading(shown: Sequence[Drawing]) -> str:
    """What lines, bands and dots are in all of the panels; what is special to some of them under their titles."""
    common = dict.fromkeys(drawing.readings[0] for drawing in shown)
    special: dict[str, list[str]] = {}
    for drawing in shown:
        for part in drawing.readings[1:]:
            titles = special.setdefault(part, [])
            if drawing.panel.title not in titles:
                titles.append(drawing.panel.title)
    everywhere = {drawing.panel.title for drawing in shown}
    told = [
        part if len(titles) == len(everywhere) else f"{', '.join(titles).lower()}: {part}"
        for part, titles in special.items()
    ]
    return "; ".join([*common, *told])


def _readings(panel: Panel, groups: Sequence[Group], curves: Sequence[Curve], seen: Resolution) -> tuple[str, ...]:
    counts = sorted({len(curve.spread.lines) for curve in curves})
    word = "seed" if all(group.has_distinct_seeds for group in groups) else "run"
    if counts[-1] == 1:
        parts = [f"one {word} each: no spread is known" if len(curves) > 1 else f"one {word}: no spread is known"]
    else:
        many = f"of {counts[0]} {word}s" if len(counts) == 1 else f"over the {word}s"
        parts = [f"mean {many}, band: lowest to highest"]
    if panel.sparse and counts[-1] > 1:
        parts.append(f"dots: single {word}s")
    if seen.window > 1:
        parts.append(f"smoothed over {seen.window} steps")
    if seen.stretch > 1:
        parts.append(f"a point is the mean of {seen.stretch} steps")
    if any(curve.spread.rest for curve in curves):
        parts.append(f"thin: {word}s that got further than others")
    return tuple(parts)
