"""Metrics that merge exactly across micro-batches and ranks: each carries its weight and its reduction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "max", "min", "sum"]


@dataclass(frozen=True)
class Metric:
    """One metric of one micro-batch.

    Attributes:
        value: scalar; for `mean` the *sum* of the averaged values, otherwise the value itself.
        weight: scalar; for `mean` the number of summed values, otherwise 1.
        reduction: how the values of several micro-batches, mini-batches or ranks combine.
    """

    value: Tensor
    weight: Tensor
    reduction: Reduction = "mean"

    def cpu(self) -> Metric:
        """Copy the metric to host memory."""
        return Metric(self.value.cpu(), self.weight.cpu(), self.reduction)


def mean_of(values: Tensor, mask: Tensor) -> Metric:
    """Return the mean of `values` over the true positions of `mask` (same shape; values elsewhere may be NaN)."""
    kept = torch.where(mask, values, 0.0)
    return Metric(kept.detach().sum(), mask.sum())


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
    if a.reduction in ("mean", "sum"):
        return Metric(a.value + b.value, a.weight + b.weight, a.reduction)
    fold = torch.maximum if a.reduction == "max" else torch.minimum
    return Metric(fold(a.value, b.value), a.weight, a.reduction)


def to_floats(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Convert to plain numbers for the trackers; a mean over no values is 0."""
    floats = {}
    for name, metric in metrics.items():
        value = float(metric.value)
        if metric.reduction == "mean":
            weight = float(metric.weight)
            value = value / weight if weight else 0.0
        floats[name] = value
    return floats
