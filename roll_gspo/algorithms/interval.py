"""95 % confidence intervals of a mean over prompts.

Prompts are the independent units. The samples of one prompt are correlated, so that they are averaged first, and the
interval follows from the spread *between* prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Estimate(NamedTuple):
    """A mean and its 95 % confidence interval; `low` and `high` are NaN if the spread is unknown (a single value)."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float], num_samples: int, *, is_fraction: bool) -> Estimate:
    """Return the mean over prompts with its interval.

    Args:
        values: one per prompt, at least one: a score or probability, averaged over the prompt's samples.
        num_samples: number of samples over all prompts.
        is_fraction: every sample lies in 0 to 1. The interval is then `wilson`, within 0 to 1, else `student`.
    """
    return wilson(values, num_samples) if is_fraction else student(values)


def wilson(values: Sequence[float], num_samples: int) -> Estimate:
    """Return Wilson's score interval with the effective number of samples of clustered data (Korn and Graubard 1998).

    The effective number is p (1 - p) / SE^2, with SE the standard error of a mean over prompts. It is multiplied by the
    squared ratio of Student's quantiles for `num_samples` and for the number of prompts, because few prompts estimate
    the spread badly. It is at most `num_samples`. With one sample of 0 or 1 per prompt it is the number of prompts,
    which gives Wilson's original interval. If all values are 0, all are 1, or there is one prompt, the spread is
    unknown and each prompt counts as one sample: 0 of 30 is [0, 0.114] for any number of samples per prompt.
    """
    count, mean = len(values), math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    binomial = mean * (1 - mean)
    effective = float(count)
    if binomial > 0 and count > 1:
        few = (t_quantile(num_samples - 1) / t_quantile(count - 1)) ** 2
        effective = min(binomial * count**2 / squares * few, num_samples) if squares else float(num_samples)
    factor = 1 + Z**2 / effective
    centre = (mean + Z**2 / (2 * effective)) / factor
    half = Z * math.sqrt(max(binomial, 0.0) / effective + Z**2 / (4 * effective**2)) / factor
    return Estimate(mean, min(max(centre - half, 0.0), mean), max(min(centre + half, 1.0), mean))


def student(values: Sequence[float]) -> Estimate:
    """Return Student's t interval of the values, for scores of any size; the limits are NaN for a single value."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(mean, math.nan, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_quantile(count - 1) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half)


@cache
def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution for an integer number of degrees, by bisection."""
    low, high = 0.0, 13.0  # 12.71 at one degree
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _central_mass(middle, degrees) < 0.95 else (low, middle)
    return high


def _central_mass(t: float, degrees: int) -> float:
    """Return P(|T| < t): Abramowitz and Stegun 26.7.3 (odd degrees) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, total = math.cos(angle), 0.0
    term = cosine if degrees % 2 else 1.0
    for power in range(1 if degrees % 2 else 0, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    mass = math.sin(angle) * total
    return 2 / math.pi * (angle + mass) if degrees % 2 else mass
