"""Blocks that select and weight training samples: dynamic sampling, engine mismatch and staleness."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from roll_gspo.config.base import Problem, Schema, used_only_with


class TrainInferCorrectionConfig(Schema):
    """Importance weights that correct the mismatch between trainer and generation-engine probabilities."""

    level: Literal["token", "geometric", "sequence"]
    """Level of the weight: the ratio of each token, or its geometric mean or product over a response."""
    mode: Literal["truncate", "mask"]
    """Treatment of a weight outside the bounds: `truncate` sets it to the bound, `mask` to 0."""
    lower_bound: NonNegativeFloat = 0.0
    """Lower bound of the weight."""
    upper_bound: PositiveFloat = 2.0
    """Upper bound of the weight."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield bounds that are not in ascending order."""
        yield from super().broken_rules()
        if self.lower_bound >= self.upper_bound:
            message = f"{self.lower_bound:g} is not below upper_bound {self.upper_bound:g}; lower it"
            yield Problem("lower_bound", message, ("upper_bound",))


class StalenessGateConfig(Schema):
    """Action on samples that are too far from the policy that is trained on them."""

    min_ess: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Smallest effective sample size of the importance weights of a rollout, over their number."""
    action: Literal["wait", "skip", "stop"]
    """Action below `min_ess`: `wait` trains, but generates the next batches with the newest weights until the value has
    recovered; `skip` skips the policy update; `stop` skips it, saves and ends the run."""
    level: Literal["token", "geometric", "sequence"] | None = None
    """Level of the weights; null: that of `train_infer_correction`, else `sequence`."""


class MismatchGateConfig(Schema):
    """Action on a generation engine that computes another policy than the trainer from the same weights."""

    max_kl: PositiveFloat = 0.01
    """Largest mean KL(generation engine || trainer) in nats per token, by k3 on the sampled tokens."""
    action: Literal["warn", "stop"] = "warn"
    """Action above `max_kl`: `warn` logs the likely causes; `stop` ends the run with them before its first update."""


class FilterArgs(Schema):
    """Thresholds of a query filter."""

    std_threshold: NonNegativeFloat = 0.0
    """`std_filter` drops groups whose scores have a standard deviation of at most this."""
    threshold_down: float | None = None
    """`mean_filter` drops groups with a mean score at or below this."""
    threshold_up: float | None = None
    """`mean_filter` drops groups with a mean score at or above this."""


class QueryFilterConfig(Schema):
    """Filter that selects the groups that dynamic sampling drops."""

    type: Literal["no_filter", "std_filter", "mean_filter"]
    """Criterion: `std_filter` uses the spread of a group's scores, `mean_filter` their mean. `no_filter` drops none."""
    filter_args: FilterArgs = FilterArgs()
    """Thresholds of the filter."""

    def broken_rules(self) -> Iterator[Problem]:
        """Yield thresholds that the filter does not use or that it lacks, and an empty range."""
        yield from super().broken_rules()
        args = self.filter_args
        if args.std_threshold and self.type != "std_filter":
            yield used_only_with("filter_args.std_threshold", "type", "std_filter")
        thresholds = {"filter_args.threshold_down": args.threshold_down, "filter_args.threshold_up": args.threshold_up}
        for key, value in thresholds.items():
            if value is not None and self.type != "mean_filter":
                yield used_only_with(key, "type", "mean_filter")
            if value is None and self.type == "mean_filter":
                yield Problem(key, "is needed by type: mean_filter; set it", ("type",))
        low, high = args.threshold_down, args.threshold_up
        if self.type == "mean_filter" and low is not None and high is not None and low >= high:
            message = f"{low:g} is not below filter_args.threshold_up {high:g}, so every group is dropped; lower it"
            yield Problem("filter_args.threshold_down", message, ("filter_args.threshold_up",))
