"""Metric families: metrics logged per domain, reward component or validation set, drawn as one chart per family."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from roll_gspo.report.charts import Chart, LineStyle, Series
from roll_gspo.report.run_folder import RunFolder
from roll_gspo.report.style import SERIES_COLORS


@dataclass(frozen=True)
class MetricFamily:
    """Metrics that share a chart.

    Attributes:
        title, note, y_label: of the chart.
        pattern: matches the full name of a metric. Group `line` is the label; the optional group `k` is the number of
            samples per prompt.
        style: of the lines.
        needs_two: draw nothing for a single line, which another metric of the run already shows.
    """

    title: str
    note: str
    y_label: str
    pattern: str
    style: LineStyle = LineStyle.LINE
    needs_two: bool = False


FAMILIES = (
    MetricFamily(
        "Score by domain",
        "Mean score of the samples of each step.",
        "mean score",
        r"domain/(?P<line>.+)/score_mean",
        needs_two=True,
    ),
    MetricFamily("Reward components", "Mean over the samples of each step.", "mean", r"reward/component/(?P<line>.+)"),
    MetricFamily(
        "Validation: avg@k",
        "Mean score of k samples per prompt.",
        "mean score",
        r"validation/(?P<line>.+)/avg@(?P<k>\d+)",
        LineStyle.DOTS,
    ),
    MetricFamily(
        "Validation: pass@k",
        "Probability that at least one of k samples is correct.",
        "probability",
        r"validation/(?P<line>.+)/pass@(?P<k>\d+)",
        LineStyle.DOTS,
    ),
    MetricFamily(
        "Validation: maj@k",
        "Probability that the most frequent answer of k samples is correct.",
        "probability",
        r"validation/(?P<line>.+)/maj@(?P<k>\d+)",
        LineStyle.DOTS,
    ),
    MetricFamily(
        "Response length by domain",
        "Mean over the samples of each step.",
        "tokens",
        r"domain/(?P<line>.+)/response_length_mean",
        needs_two=True,
    ),
    MetricFamily(
        "Samples by domain", "Samples per step.", "samples per step", r"domain/(?P<line>.+)/num_samples", needs_two=True
    ),
    MetricFamily(
        "Failed rewards by domain",
        "Samples without a score.",
        "samples per step",
        r"domain/(?P<line>.+)/failed",
        needs_two=True,
    ),
    MetricFamily(
        "Ends of episodes",
        "Share of the episodes that the environment ended, that reached a limit, or whose environment failed.",
        "fraction of episodes",
        r"episode/end_(?P<line>\w+)",
    ),
    MetricFamily("Tokens by lag", "Share of the response tokens.", "fraction", r"staleness/share_(?P<line>\d+)"),
    MetricFamily("KL by lag", "From engine to old policy.", "nats per token", r"staleness/kl_lag_(?P<line>\w+)"),
    MetricFamily(
        "Effective sample size by lag",
        "Of the weights old policy over generation engine, before any bound.",
        "fraction",
        r"staleness/ess_lag_(?P<line>\w+)",
    ),
    MetricFamily(
        "Clip fraction by lag",
        "Share of the tokens of each lag whose gradient is clipped.",
        "fraction",
        r"actor/clip_fraction_lag_(?P<line>\w+)",
    ),
)


def family_charts(run: RunFolder) -> list[Chart]:
    """Return the charts of all families with data. A family with more lines than colors gets several charts."""
    charts, num_colors = [], len(SERIES_COLORS)
    for family in FAMILIES:
        series = [(label, points) for name, label in _lines(family, run) if (points := run.points(name))]
        for first in range(0, len(series), num_colors):
            number = f" ({first // num_colors + 1})" if len(series) > num_colors else ""
            lines = (
                Series(label, points, color, family.style)
                for color, (label, points) in enumerate(series[first : first + num_colors])
            )
            charts.append(Chart(family.title + number, family.note, family.y_label, tuple(lines)))
    return charts


def family_metrics(run: RunFolder) -> set[str]:
    """Return the names of the metrics that `family_charts` draws."""
    return {name for family in FAMILIES for name, _ in _lines(family, run)}


def _natural(label: str) -> tuple[float, str]:
    """Return the sort key of a label: numbers first, by their value."""
    return (float(label), "") if label.isdecimal() else (math.inf, label)


def _lines(family: MetricFamily, run: RunFolder) -> list[tuple[str, str]]:
    """Return (metric, label) of each line, ordered by label and k."""
    found = [(name, match.groupdict()) for name in run.metric_names if (match := re.fullmatch(family.pattern, name))]
    if family.needs_two and len(found) < 2:
        return []
    found.sort(key=lambda pair: (_natural(pair[1]["line"]), int(pair[1].get("k", 0))))
    has_several_k = len({groups.get("k") for _, groups in found}) > 1
    return [(name, f"{groups['line']} @{groups['k']}" if has_several_k else groups["line"]) for name, groups in found]
