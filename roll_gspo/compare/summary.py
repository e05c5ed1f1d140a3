"""The table of final values: mean and standard deviation over the seeds of a group, and the value of each seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from roll_gspo.compare.runs import Group, Run
from roll_gspo.report.numbers import format_number
from roll_gspo.report.run_folder import SCORE, VALIDATION

_NUM_LAST = 5
_MISSING = "—"


class Reduction(StrEnum):
    """Reduction of a run's values to one."""

    LAST_STEPS = f"mean of last {_NUM_LAST} steps"
    LAST = "last validation"
    MEAN = "mean of all steps"
    SUM = "total"


@dataclass(frozen=True)
class SummaryMetric:
    """A column of the table.

    Attributes:
        title: with the unit.
        metrics: the first one that a run has is used.
        reduction: of a run's values to one.
        scale: divisor of the values.
    """

    title: str
    metrics: tuple[str, ...]
    reduction: Reduction
    scale: float = 1.0


SUMMARY_METRICS = (
    SummaryMetric("Training reward", SCORE, Reduction.LAST_STEPS),
    SummaryMetric("Held-out accuracy", VALIDATION, Reduction.LAST),
    SummaryMetric("Clipped fraction", ("actor/clip_fraction",), Reduction.MEAN),
    SummaryMetric("|ratio − 1|", ("actor/ratio_deviation",), Reduction.MEAN),
    SummaryMetric("Entropy (nats)", ("actor/entropy",), Reduction.LAST_STEPS),
    SummaryMetric("Length (tokens)", ("rollout/response_length_mean",), Reduction.LAST_STEPS),
    SummaryMetric("Gradient norm", ("actor/grad_norm",), Reduction.LAST_STEPS),
    SummaryMetric("Tokens (thousands)", ("rollout/num_tokens",), Reduction.SUM, 1e3),
    SummaryMetric("Time (minutes)", ("time/step",), Reduction.SUM, 60.0),
)


@dataclass(frozen=True)
class SummaryColumn:
    """A metric of every run.

    Attributes:
        metric: which.
        values: by group, by run; None if a run does not log the metric.
    """

    metric: SummaryMetric
    values: tuple[tuple[float | None, ...], ...]

    def group_text(self, group: int) -> str:
        """Return `mean ± standard deviation` of a group, only the value if there is one run, or a dash."""
        known = [value for value in self.values[group] if value is not None]
        if not known:
            return _MISSING
        if len(known) == 1:
            return _cell(known[0])
        return format_mean(statistics.fmean(known), statistics.stdev(known))

    def run_text(self, group: int, run: int) -> str:
        """Return the value of one run of a group, or a dash."""
        value = self.values[group][run]
        return _MISSING if value is None else _cell(value)


def summary_columns(groups: Sequence[Group]) -> list[SummaryColumn]:
    """Return the columns for which at least one run has a value."""
    columns = [
        SummaryColumn(metric, tuple(tuple(_value(run, metric) for run in group.runs) for group in groups))
        for metric in SUMMARY_METRICS
    ]
    return [column for column in columns if any(value is not None for row in column.values for value in row)]


def format_mean(mean: float, deviation: float) -> str:
    """Return `mean ± deviation`, rounded to two significant digits of the deviation."""
    if deviation == 0 or not math.isfinite(deviation):
        return f"{_cell(mean)} ± {deviation:g}"
    if 0 < abs(mean) < 1e-3:
        exponent = math.floor(math.log10(abs(mean)))
        power = 10.0**exponent
        return f"({mean / power:.2f} ± {deviation / power:.2f})e{exponent}"
    decimals = min(max(0, 1 - math.floor(math.log10(deviation))), 5)
    return f"{mean:,.{decimals}f} ± {deviation:.{decimals}f}"


def _cell(value: float) -> str:
    return format_number(value, digits=3, pad=True)


def _value(run: Run, metric: SummaryMetric) -> float | None:
    values = [value / metric.scale for _, value in run.points(metric.metrics)]
    if not values:
        return None
    match metric.reduction:
        case Reduction.LAST:
            return values[-1]
        case Reduction.LAST_STEPS:
            return statistics.fmean(values[-_NUM_LAST:])
        case Reduction.MEAN:
            return statistics.fmean(values)
        case Reduction.SUM:
            return math.fsum(values)
