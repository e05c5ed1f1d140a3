"""Figures that a run has once for each domain, reward component or validation group: a chart with a line for each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from roll_gspo.report.curves import Chart, Series
from roll_gspo.report.run_folder import RunFolder

_COLORS = 8


@dataclass(frozen=True)
class Family:
    """Metrics that belong into one chart.

    Attributes:
        title, note: of the chart.
        pattern: of the whole name; its group `line` names the line, its group `k`, if any, the samples a prompt.
        style: of the lines.
        alone: one line is worth a chart of its own; else the run's own curve says the same.
    """

    title: str
    note: str
    pattern: str
    style: str = "line"
    alone: bool = True


FAMILIES = (
    Family("Score by domain", "Mean score of the step's samples.", r"domain/(?P<line>.+)/score_mean", alone=False),
    Family("Reward components", "Mean over the step's samples.", r"reward/component/(?P<line>.+)"),
    Family(
        "Validation: avg@k",
        "Mean score of k samples a prompt.",
        r"validation/(?P<line>.+)/avg@(?P<k>\d+)",
        style="dots",
    ),
    Family(
        "Validation: pass@k",
        "Chance that one of k samples is right.",
        r"validation/(?P<line>.+)/pass@(?P<k>\d+)",
        style="dots",
    ),
    Family(
        "Validation: maj@k",
        "Chance that the commonest answer of k samples is right.",
        r"validation/(?P<line>.+)/maj@(?P<k>\d+)",
        style="dots",
    ),
    Family("Response length by domain", "Tokens.", r"domain/(?P<line>.+)/response_length_mean", alone=False),
    Family("Samples by domain", "In the step.", r"domain/(?P<line>.+)/num_samples", alone=False),
    Family("Failed rewards by domain", "Samples without a score.", r"domain/(?P<line>.+)/failed", alone=False),
)


def family_charts(run: RunFolder) -> list[Chart]:
    """The charts that there is something for; more lines than colours are drawn in several."""
    charts = []
    for family in FAMILIES:
        lines = _lines(family, run)
        series = [(label, points) for name, label in lines if (points := run.points(name))]
        for first in range(0, len(series), _COLORS):
            part = series[first : first + _COLORS]
            title = family.title if len(series) <= _COLORS else f"{family.title} ({first // _COLORS + 1})"
            drawn = tuple(Series(label, points, i + 1, family.style) for i, (label, points) in enumerate(part))
            charts.append(Chart(title, family.note, drawn))
    return charts


def family_names(run: RunFolder) -> set[str]:
    """The metrics that those charts show."""
    return {name for family in FAMILIES for name, _ in _lines(family, run)}


def _lines(family: Family, run: RunFolder) -> list[tuple[str, str]]:
    """(metric, label) of each line, by group and k."""
    found = [(name, match.groupdict()) for name in run.names() if (match := re.fullmatch(family.pattern, name))]
    if len(found) < 2 and not family.alone:
        return []
    found.sort(key=lambda pair: (pair[1]["line"], int(pair[1].get("k", 0))))
    several = len({parts.get("k") for _, parts in found}) > 1
    return [(name, f"{parts['line']} @{parts['k']}" if several else parts["line"]) for name, parts in found]
