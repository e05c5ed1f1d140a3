"""Distributions of scores and response lengths over the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from roll_gspo.report.charts import Chart, LineStyle, Series
from roll_gspo.report.embedded import StepValues


def distribution_charts(steps: Sequence[StepValues]) -> list[Chart]:
    """Return the charts of scores and lengths: median, 10th to 90th percentile, minimum, maximum.

    Args:
        steps: values of steps in order, not necessarily of all steps.
    """
    note = "Median, 10th to 90th percentile, minimum and maximum over the samples."
    found = [
        Chart("Distribution of scores", note, "score", _lines([(one.step, one.scores) for one in steps])),
        Chart("Distribution of lengths", note, "tokens", _lines([(one.step, one.lengths) for one in steps])),
    ]
    return [chart for chart in found if chart.series]


def _lines(steps: Sequence[tuple[int, Sequence[float]]]) -> tuple[Series, ...]:
    known = [(step, values) for step, values in steps if values]
    if not known:
        return ()
    quantiles = np.array([np.quantile(values, (0, 0.1, 0.5, 0.9, 1)) for _, values in known])
    low, tenth, median, ninetieth, high = (
        [(step, value) for (step, _), value in zip(known, column, strict=True)] for column in quantiles.T.tolist()
    )
    return (
        Series("minimum", low, 0, LineStyle.FAINT),
        Series("maximum", high, 0, LineStyle.FAINT),
        Series("median", median, 0, LineStyle.LINE, [v for _, v in tenth], [v for _, v in ninetieth]),
    )
