"""Dynamic sampling: keep or drop the groups of a rollout by their scores (DAPO, arXiv 2503.14476, eq. 11)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.reward_norm import Moments, group_moments


@dataclass(frozen=True)
class QueryFilterSettings:
    """Settings of a query filter.

    Attributes:
        type: a name in `QUERY_FILTERS`.
        std_threshold: `std_filter` keeps groups with a std above it.
        threshold_down, threshold_up: `mean_filter` keeps groups with a mean strictly between them.
    """

    type: str = "no_filter"
    std_threshold: float = 0.0
    threshold_down: float = -math.inf
    threshold_up: float = math.inf


def no_filter(moments: Moments, settings: QueryFilterSettings) -> Tensor:
    """Keep every group."""
    return torch.ones_like(moments.mean, dtype=torch.bool)


def std_filter(moments: Moments, settings: QueryFilterSettings) -> Tensor:
    """Keep groups whose scores have an unbiased std above `std_threshold`; a group of one has std 0."""
    return moments.std > settings.std_threshold


def mean_filter(moments: Moments, settings: QueryFilterSettings) -> Tensor:
    """Keep groups with a mean score strictly between `threshold_down` and `threshold_up`.

    With scores of 0 and 1 and the thresholds 0 and 1 this is DAPO's filter: some answers are right, but not all.
    """
    return (moments.mean > settings.threshold_down) & (moments.mean < settings.threshold_up)


QUERY_FILTERS: Mapping[str, Callable[[Moments, QueryFilterSettings], Tensor]] = {
    "no_filter": no_filter,
    "std_filter": std_filter,
    "mean_filter": mean_filter,
}


def kept_groups(scores: Tensor, group_ids: Tensor, settings: QueryFilterSettings) -> Tensor:
    """Return [B] bool per sample: true if its group is kept.

    Args:
        scores: [B] from the reward workers, not normalised.
        group_ids: [B] integers; samples of one prompt share one.
        settings: of the query filter.
    """
    return QUERY_FILTERS[settings.type](group_moments(scores.double(), group_ids, None), settings)
