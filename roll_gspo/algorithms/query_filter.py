"""Dynamic sampling: which prompts' groups are worth training on, by their scores (DAPO, arXiv 2503.14476, eq. 11)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from roll_gspo.algorithms.choice import choose
from roll_gspo.algorithms.reward_norm import Moments, group_moments


@dataclass(frozen=True)
class QueryFilterSettings:
    """Which groups stay.

    Attributes:
        type: a name in `QUERY_FILTERS`.
        std_threshold: of `std_filter`; a group's std must be above it.
        threshold_down, threshold_up: of `mean_filter`; a group's mean must be strictly between them.

    Raises:
        ValueError: `type` is unknown or the thresholds leave nothing.
    """

    type: str = "no_filter"
    std_threshold: float = 0.0
    threshold_down: float = -math.inf
    threshold_up: float = math.inf

    def __post_init__(self) -> None:
        choose(QUERY_FILTERS, "query_filter_config.type", self.type)
        if not self.threshold_down < self.threshold_up:
            raise ValueError(
                f"threshold_down: {self.threshold_down} is not below threshold_up {self.threshold_up}; lower it"
            )


def no_filter(moments: Moments, settings: QueryFilterSettings) -> Tensor:
    """All stay."""
    return torch.ones_like(moments.mean, dtype=torch.bool)


def std_filter(moments: Moments, settings: QueryFilterSettings) -> Tensor:
    """The unbiased std of the group's scores is above `std_threshold`; a group of one has std 0."""
    return moments.std > settings.std_threshold


def mean_filter(moments: Moments, settings: QueryFilterSettings) -> Tensor:
    """The group's mean score is strictly between `threshold_down` and `threshold_up`.

    With scores of 0 and 1 and the thresholds 0 and 1 this is DAPO's filter: some answers right, not all.
    """
    return (moments.mean > settings.threshold_down) & (moments.mean < settings.threshold_up)


QUERY_FILTERS: Mapping[str, Callable[[Moments, QueryFilterSettings], Tensor]] = {
    "no_filter": no_filter,
    "std_filter": std_filter,
    "mean_filter": mean_filter,
}


def kept_groups(scores: Tensor, group_ids: Tensor, settings: QueryFilterSettings) -> Tensor:
    """[B] bool per sample: its group stays.

    Args:
        scores: [B] of the reward workers, as given.
        group_ids: [B] integers; samples of one prompt share one.
        settings: the choices.
    """
    return QUERY_FILTERS[settings.type](group_moments(scores.double(), group_ids, None), settings)
