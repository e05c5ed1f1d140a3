"""Metrics that merge exactly across micro-batches and ranks: each carries its weight and its reduction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "rms", "max", "min", "sum", "ess"]


@dataclass(frozen=True)
class Metric:
    """One metric of one micro-batch.

    Attributes:
        value: scalar; for `mean` the *sum* of the averaged values, for `rms` (root mean square) the sum of their
            squares, otherwise the value itself. For `ess` [2]: the sum of the importance weights and the sum of their
            squares.
        weight: scalar; for `mean`, `rms` and `ess` the number of summed values, otherwise 1.
        reduction: how the values of several micro-batches, mini-batches or ranks combine.
    """

    value: Tensor
    weight: Tensor
    reduction: Reduction = "mean"


def mean_of(values: Tensor, mask: Tensor) -> Metric:
    """Return the mean of `values` over the true positions of `mask` (same shape; values elsewhere may be NaN)."""
    kept = torch.where(mask, values, 0.0)
    return Metric(kept.detach().sum(), mask.sum())


def rms_of(values: Tensor, mask: Tensor) -> Metric:
    """Return the root mean square of `values` over the true positions of `mask` (same shape)."""
    return replace(mean_of(values.detach().square(), mask), reduction="rms")


def ess_of(weights: Tensor, mask: Tensor) -> Metric:
    """Return the effective sample size of importance weights over their number, `(sum w)^2 / (N sum w^2)`.

    The parts of a batch merge to the value of the whole batch. `weights` count where `mask` of the same shape is true.
    """
    kept = torch.where(mask, weights, 0.0).detach()
    return Metric(torch.stack([kept.sum(), kept.square().sum()]), mask.sum(), "ess")


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge the metrics of several micro-batches by name.

    Raises:
        ValueError: two metrics of one name have different reductions.
    """
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = _fold(merged[name], metric) if name in merged else metric
    return merged


def _fold(a: Metric, b: Metric) -> Metric:
    if a.reduction != b.reduction:
        raise ValueError(f"a metric has two reductions: {a.reduction} and {b.reduction}")
    if a.reduction in ("mean", "rms", "sum", "ess"):
        return Metric(a.value + b.value, a.weight + b.weight, a.reduction)
    fold = torch.maximum if a.reduction == "max" else torch.minimum
    return Metric(fold(a.value, b.value), a.weight, a.reduction)


def to_floats(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Convert to plain numbers for the trackers; a mean over no values is 0."""
    floats = {}
    for name, metric in metrics.items():
        if metric.reduction == "ess":
            total, squares = metric.value.tolist()
            floats[name] = total**2 / (squares * float(metric.weight)) if squares else 0.0
            continue
        value = float(metric.value)
        if metric.reduction in ("mean", "rms"):
            weight = float(metric.weight)
            value = value / weight if weight else 0.0
            value = math.sqrt(value) if metric.reduction == "rms" else value
        floats[name] = value
    return floats
