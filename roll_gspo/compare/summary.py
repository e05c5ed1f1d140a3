"""The table of final values: per group mean and standard deviation over seeds, and each seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from roll_gspo.compare.panels import SCORE, VALIDATION
from roll_gspo.compare.runs import Group, Run
from roll_gspo.report.run_folder import Points

NUM_LAST = 5
ABSENT = "—"


class Over(StrEnum):
    """Which figures of a run make its value."""

    LAST_STEPS = f"mean of last {NUM_LAST} steps"
    LAST = "last validation"
    WHOLE = "mean of all steps"
    SUM = "in all"


@dataclass(frozen=True)
class Quantity:
    """A column.

    Attributes:
        title: with the unit.
        metrics: the first that a run has counts.
        over: of which figures.
        scale: what a figure is divided by.
    """

    title: str
    metrics: tuple[str, ...]
    over: Over
    scale: float = 1.0


QUANTITIES = (
    Quantity("Training reward", SCORE, Over.LAST_STEPS),
    Quantity("Held-out accuracy", VALIDATION, Over.LAST),
    Quantity("Clipped fraction", ("actor/clip_fraction",), Over.WHOLE),
    Quantity("|ratio − 1|", ("actor/ratio_deviation",), Over.WHOLE),
    Quantity("Entropy (nats)", ("actor/entropy",), Over.LAST_STEPS),
    Quantity("Length (tokens)", ("rollout/response_length_mean",), Over.LAST_STEPS),
    Quantity("Gradient norm", ("actor/grad_norm",), Over.LAST_STEPS),
    Quantity("Tokens (thousands)", ("rollout/num_tokens",), Over.SUM, 1e3),
    Quantity("Time (minutes)", ("time/step",), Over.SUM, 60.0),
)


@dataclass(frozen=True)
class Column:
    """A quantity of every run.

    Attributes:
        quantity: which.
        values: by group, by run; None where a run has no such figure.
        steps: of the same shape: the step that a last validation is of, else None.
    """

    quantity: Quantity
    values: tuple[tuple[float | None, ...], ...]
    steps: tuple[tuple[int | None, ...], ...]

    def of_group(self, number: int) -> str:
        """`mean ± standard deviation` of a group; what there is where that cannot be said."""
        known = [value for value in self.values[number] if value is not None]
        if not known:
            return ABSENT
        if len(known) == 1:
            return number_text(known[0])
        return with_deviation(statistics.fmean(known), statistics.stdev(known))

    def of_run(self, number: int, run: int) -> str:
        """The value of one run of a group."""
        value = self.values[number][run]
        return ABSENT if value is None else number_text(value)


def columns(groups: Sequence[Group]) -> list[Column]:
    """Every quantity that some run has."""
    found = []
    for quantity in QUANTITIES:
        cells = [[_value(run, quantity) for run in group.runs] for group in groups]
        if any(value is not None for row in cells for value, _ in row):
            values = tuple(tuple(value for value, _ in row) for row in cells)
            found.append(Column(quantity, values, tuple(tuple(step for _, step in row) for row in cells)))
    return found


def number_text(value: float) -> str:
    """Three significant digits; four where they stand before the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:#.3g}".rstrip(".")


def with_deviation(mean: float, deviation: float) -> str:
    """`mean ± deviation`, to the second digit of the deviation."""
    if deviation == 0 or not math.isfinite(deviation):
        return f"{number_text(mean)} ± {deviation:g}"
    if 0 < abs(mean) < 1e-3:
        exponent = math.floor(math.log10(abs(mean)))
        power = 10.0**exponent
        return f"({mean / power:.2f} ± {deviation / power:.2f})e{exponent}"
    decimals = min(max(0, 1 - math.floor(math.log10(deviation))), 5)
    return f"{mean:,.{decimals}f} ± {deviation:.{decimals}f}"


def _value(run: Run, quantity: Quantity) -> tuple[float | None, int | None]:
    points: Points = run.points(quantity.metrics)
    if not points:
        return None, None
    values = [value / quantity.scale for _, value in points]
    match quantity.over:
        case Over.LAST:
            return values[-1], points[-1][0]
        case Over.LAST_STEPS:
            return statistics.fmean(values[-NUM_LAST:]), None
        case Over.WHOLE:
            return statistics.fmean(values), None
        case Over.SUM:
            return math.fsum(values), None
