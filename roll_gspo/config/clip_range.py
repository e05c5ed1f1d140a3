"""The clip range that a policy loss uses if the configuration sets no bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field

from roll_gspo.declarations import POLICY_LOSSES, RATIOS

ClipLow = Annotated[float, Field(gt=0, le=1)]
ClipHigh = Annotated[float, Field(gt=0)]


def _tuple_of_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


ClipRange = Annotated[tuple[ClipLow, ClipHigh], BeforeValidator(_tuple_of_list)]


LENGTH_SCALED_RANGE = (0.03, 0.03)  # as of policy_loss fspo
MAX_NOISE_SHARE = 1 / 3
"""Noise of the importance ratio, over the distance of the nearer clip bound, above which runs and reports warn."""


class DefaultClipRange(NamedTuple):
    """A clip range and the key that it belongs to.

    Attributes:
        low: distance of the lower bound from 1.
        high: distance of the upper bound from 1.
        origin: the key, with its value if that has the range by definition.
    """

    low: float
    high: float
    origin: str


def default_clip_range(
    policy_loss: str,
    importance_sampling: str,
    ranges: Mapping[str, tuple[float, float]],
    length_scaling: bool = False,
) -> DefaultClipRange | None:
    """Return the clip range of a combination, or None if it has none.

    The range of the policy loss comes first, since it has its own scale. That of `length_scaling` follows
    (`pg_clip_length_scaling`), then `ranges` (`pg_clip_ranges`, which presets set), and last the range of the ratio.

    Raises:
        ConfigError: a name is unknown.
    """
    loss = POLICY_LOSSES.declaration(policy_loss)
    if not loss.needs_clip_range:
        return None
    if loss.clip_range is not None:
        return DefaultClipRange(*loss.clip_range, f"policy_loss: {policy_loss}")
    if length_scaling:
        return DefaultClipRange(*LENGTH_SCALED_RANGE, "pg_clip_length_scaling")
    if importance_sampling in ranges:
        return DefaultClipRange(*ranges[importance_sampling], f"pg_clip_ranges.{importance_sampling}")
    bounds = RATIOS.declaration(importance_sampling).clip_range
    return None if bounds is None else DefaultClipRange(*bounds, f"importance_sampling: {importance_sampling}")


def nearest_log_bound(low: float, high: float, length_scaling: bool = False) -> float:
    """Return the distance in log space between a ratio of 1 and its nearer clip bound.

    Args:
        low, high: clip range around 1.
        length_scaling: the range already bounds a log-ratio (`pg_clip_length_scaling`, `policy_loss: fspo`).
    """
    if length_scaling:
        return min(low, high)
    return min(-math.log1p(-low) if low < 1 else math.inf, math.log1p(high))
