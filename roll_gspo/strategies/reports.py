"""Reports of micro-batches: losses and metrics that stay on the device until an optimizer step needs them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from roll_gspo.batch import moved
from roll_gspo.metrics import Metric

# (share of the loss without gradient, metrics) of one micro-batch
Report = tuple[Tensor, dict[str, Metric]]


def on_host(reports: Sequence[Report]) -> list[tuple[float, dict[str, Metric]]]:
    """Return losses as numbers and metrics in host memory. The host waits for the device once per dtype."""
    tensors = [
        tensor
        for loss, metrics in reports
        for tensor in (loss, *(part for metric in metrics.values() for part in (metric.value, metric.weight)))
    ]
    copies = iter(moved(tensors, "cpu"))
    return [
        (
            float(next(copies)),
            {name: Metric(next(copies), next(copies), metric.reduction) for name, metric in metrics.items()},
        )
        for _, metrics in reports
    ]
