from __future__ import annotations

import math

import pytest
import torch

from roll_gspo.metrics import Metric, ess_of, mean_of, merge, to_floats


def metric(value: float, weight: float = 1.0, reduction: str = "mean") -> Metric:
    return Metric(torch.tensor(value), torch.tensor(weight), reduction)  # type: ignore[arg-type]


def test_merged_mean_weights_each_part_by_its_count() -> None:
    merged = merge([{"a": metric(6.0, 3)}, {"a": metric(1.0, 1)}])
    assert to_floats(merged) == {"a": 7 / 4}


def test_max_min_and_sum_are_merged_by_their_reduction() -> None:
    parts = [
        {"max": metric(1, reduction="max"), "min": metric(1, reduction="min"), "sum": metric(1, reduction="sum")},
        {"max": metric(3, reduction="max"), "min": metric(3, reduction="min"), "sum": metric(3, reduction="sum")},
    ]
    assert to_floats(merge(parts)) == {"max": 3.0, "min": 1.0, "sum": 4.0}


def test_effective_sample_size_of_parts_is_that_of_the_whole() -> None:
    weights, mask = torch.tensor([1.0, 3.0, 0.5, 2.0, math.nan]), torch.tensor([True, True, True, True, False])
    parts = [{"a": ess_of(weights[rows], mask[rows])} for rows in torch.arange(5).split(2)]
    assert to_floats(merge(parts))["a"] == pytest.approx(6.5**2 / (1 + 9 + 0.25 + 4) / 4)


def test_mean_over_no_values_is_zero() -> None:
    assert to_floats({"a": metric(0.0, 0)}) == {"a": 0.0}


def test_masked_values_do_not_count_even_if_nan() -> None:
    values = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    found = mean_of(values, torch.tensor([True, False, True]))
    assert to_floats({"a": found}) == {"a": 2.0}
    assert not found.value.requires_grad


def test_different_reductions_of_one_name_raise() -> None:
    with pytest.raises(ValueError, match="max and mean"):
        merge([{"a": metric(1, reduction="max")}, {"a": metric(1)}])
