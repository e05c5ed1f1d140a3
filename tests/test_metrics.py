from __future__ import annotations

import math

import pytest
import torch

from roll_gspo.metrics import Metric, mean_of, merge, to_floats


def metric(value: float, weight: float = 1.0, reduction: str = "mean") -> Metric:
    return Metric(torch.tensor(value), torch.tensor(weight), reduction)  # type: ignore[arg-type]


def test_merged_mean_weighs_each_part_by_what_it_counted() -> None:
    merged = merge([{"a": metric(6.0, 3)}, {"a": metric(1.0, 1)}])
    assert to_floats(merged) == {"a": 7 / 4}


def test_largest_smallest_and_sum_are_merged_as_such() -> None:
    parts = [
        {"max": metric(1, reduction="max"), "min": metric(1, reduction="min"), "sum": metric(1, reduction="sum")},
        {"max": metric(3, reduction="max"), "min": metric(3, reduction="min"), "sum": metric(3, reduction="sum")},
    ]
    assert to_floats(merge(parts)) == {"max": 3.0, "min": 1.0, "sum": 4.0}


def test_mean_over_nothing_is_zero() -> None:
    assert to_floats({"a": metric(0.0, 0)}) == {"a": 0.0}


def test_masked_values_do_not_count_even_if_they_are_not_numbers() -> None:
    values = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    found = mean_of(values, torch.tensor([True, False, True]))
    assert to_floats({"a": found}) == {"a": 2.0}
    assert not found.value.requires_grad


def test_one_name_has_one_reduction() -> None:
    with pytest.raises(ValueError, match="max and mean"):
        merge([{"a": metric(1, reduction="max")}, {"a": metric(1)}])
