"""Intervals against published values and their own promise: they hold the truth in 95 of 100 samples."""

from __future__ import annotations

import math
import random

import pytest

from roll_gspo.algorithms.interval import Z, estimate, student, t_quantile, wilson


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (10, 2.2281), (29, 2.0452), (120, 1.9799)],
)
def test_t_quantile_is_that_of_the_tables(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=5e-5)


def test_t_quantile_tends_to_the_normal_one() -> None:
    assert t_quantile(100_001) == pytest.approx(Z, abs=1e-4)


def test_one_sample_a_prompt_gives_wilsons_interval() -> None:
    at_zero = Z**2 / (30 + Z**2)  # its closed form where nothing, or everything, is right: 0.1135
    assert wilson([0.0] * 30, 30) == pytest.approx((0, 0, at_zero))
    assert wilson([1.0] * 30, 30) == pytest.approx((1, 1 - at_zero, 1))
    assert wilson([1.0] + [0.0] * 9, 10) == pytest.approx((0.1, 0.0179, 0.4042), abs=5e-5)


def test_samples_of_a_prompt_that_agree_count_once() -> None:
    half = [1.0, 0.0] * 15
    expected = 0.5 + Z / 2 / math.sqrt(30 * (t_quantile(239) / t_quantile(29)) ** 2 + Z**2)
    assert wilson(half, 30 * 8).high == pytest.approx(expected), "8 samples that always agree say no more than one"
    spread_within = [0.5] * 30
    assert wilson(spread_within, 240).high < wilson(half, 240).high, "prompts that do not differ tell more"
    assert wilson([0.0] * 30, 240) == wilson([0.0] * 30, 30), "nothing is known of the spread"
    assert wilson([0.5], 8) == wilson([0.5], 1), "nor of a single prompt's"


def test_students_interval_by_hand() -> None:
    mean, low, high = student([1.0, 2.0, 3.0, 6.0])
    half = 3.182446 * math.sqrt(14 / 3 / 4)  # sum of squares 14
    assert (mean, low, high) == pytest.approx((3.0, 3 - half, 3 + half), abs=1e-5)
    assert math.isnan(student([0.3]).low)
    assert student([2.0, 2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(("is_fraction", "count"), [(True, 40), (False, 40), (True, 5)])
def test_interval_holds_the_truth_as_often_as_it_says(is_fraction: bool, count: int) -> None:
    chance, held, trials = random.Random(1), 0, 400
    for _ in range(trials):
        prompts = [chance.betavariate(1, 2) for _ in range(count)]  # their mean is 1/3
        values = [sum(chance.random() < p for _ in range(8)) / 8 for p in prompts]
        _, low, high = estimate(values, 8 * count, is_fraction=is_fraction)
        held += low <= 1 / 3 <= high
    assert 0.91 <= held / trials <= 0.98  # fixed seed; three standard deviations
