"""95 % confidence intervals of a mean over prompts.

Prompts are the independent units: the samples of one prompt rise and fall together, so that they are averaged first
(a cluster has one value) and the spread *between* prompts decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Estimate(NamedTuple):
    """A mean and its 95 % confidence interval; `low` and `high` are NaN where one value says nothing of the spread."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float], num_samples: int, *, is_fraction: bool) -> Estimate:
    """The mean over prompts with its interval.

    Args:
        values: one a prompt, at least one: a score or chance, the mean over the prompt's samples.
        num_samples: behind all values together.
        is_fraction: every single sample lies in 0 to 1; then `wilson` holds the interval within 0 to 1, else `student`.
    """
    return wilson(values, num_samples) if is_fraction else student(values)


def wilson(values: Sequence[float], num_samples: int) -> Estimate:
    """Wilson's score interval with the effective number of samples of clustered data (Korn and Graubard 1998).

    That number is p (1 - p) / SE^2, with SE the standard error of a mean over prompts, times the squared ratio of
    Student's quantiles for `num_samples` and for the prompts (few prompts tell the spread badly), and at most
    `num_samples`. With one sample of 0 or 1 a prompt it is the number of prompts, i.e. Wilson's own interval. Where all
    values are 0, or all 1, or there is one prompt, nothing is known of the spread, and each prompt counts as one
    sample: 0 of 30 is [0, 0.114] however many samples a prompt has.
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
    """Student's t interval of the values, for scores of any size; NaN as limits of a single value."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Estimate(mean, math.nan, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_quantile(count - 1) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half)


@cache
def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t distribution, by bisection of its closed form for whole degrees of freedom."""
    low, high = 0.0, 13.0  # 12.71 at one degree
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _central_mass(middle, degrees) < 0.95 else (low, middle)
    return high


def _central_mass(t: float, degrees: int) -> float:
    """P(|T| < t): Abramowitz and Stegun 26.7.3 (odd degrees) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, total = math.cos(angle), 0.0
    term = cosine if degrees % 2 else 1.0
    for power in range(1 if degrees % 2 else 0, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    mass = math.sin(angle) * total
    return 2 / math.pi * (angle + mass) if degrees % 2 else mass
