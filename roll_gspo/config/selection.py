"""Blocks that decide which samples are trained on and how much: dynamic sampling, correction of the engine mismatch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat

from roll_gspo.config.base import Schema


class TrainInferCorrectionConfig(Schema):
    """Weights for the difference between the trainer's and the generation engine's probabilities."""

    level: Literal["token", "geometric", "sequence"]
    """Of which the weight is the ratio: each token, the geometric mean of a response, or its product."""
    mode: Literal["truncate", "mask"]
    """What a weight outside the bounds becomes: the bound, or 0."""
    lower_bound: NonNegativeFloat = 0.0
    """Least weight."""
    upper_bound: PositiveFloat = 2.0
    """Greatest weight."""

    def broken_rules(self) -> Iterator[str]:
        """The bounds leave room."""
        yield from super().broken_rules()
        if self.lower_bound >= self.upper_bound:
            yield f"lower_bound {self.lower_bound:g} is not below upper_bound {self.upper_bound:g}; lower it"


class FilterArgs(Schema):
    """Thresholds of a query filter."""

    std_threshold: NonNegativeFloat = 0.0
    """`std_filter` drops groups whose scores deviate by this or less."""
    threshold_down: float | None = None
    """`mean_filter` drops groups with a mean score at or below this."""
    threshold_up: float | None = None
    """`mean_filter` drops groups with a mean score at or above this."""


class QueryFilterConfig(Schema):
    """Which groups dynamic sampling drops."""

    type: Literal["no_filter", "std_filter", "mean_filter"]
    """By the spread of a group's scores, by their mean, or none."""
    filter_args: FilterArgs = FilterArgs()
    """Thresholds."""

    def broken_rules(self) -> Iterator[str]:
        """Each filter has its own thresholds."""
        yield from super().broken_rules()
        args = self.filter_args
        if args.std_threshold and self.type != "std_filter":
            yield "filter_args.std_threshold acts with type: std_filter only; set that or remove it"
        for key, value in (("threshold_down", args.threshold_down), ("threshold_up", args.threshold_up)):
            if value is not None and self.type != "mean_filter":
                yield f"filter_args.{key} acts with type: mean_filter only; set that or remove it"
        if self.type == "mean_filter":
            if args.threshold_down is None or args.threshold_up is None:
                yield "filter_args.threshold_down and filter_args.threshold_up: mean_filter needs both; set them"
            elif args.threshold_down >= args.threshold_up:
                yield (
                    f"filter_args.threshold_down {args.threshold_down:g} is not below threshold_up "
                    f"{args.threshold_up:g}, so that every group is dropped; lower it"
                )
