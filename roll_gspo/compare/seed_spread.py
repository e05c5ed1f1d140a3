"""Mean and range of a metric over the seeds of a group, against steps, tokens or time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from roll_gspo.compare.runs import Group, Run
from roll_gspo.report.run_folder import Points

Array = NDArray[np.float64]
_MAX_POINTS = 200
_WINDOW = 5


class XAxis(StrEnum):
    """Quantity of a horizontal axis."""

    STEPS = "steps"
    TOKENS = "tokens"
    TIME = "time"


# Metrics whose sum up to a step is the cost of reaching it. Tokens include those of dropped groups, time includes
# validation and checkpoints.
COST_METRICS = {XAxis.TOKENS: "rollout/num_tokens", XAxis.TIME: "time/step"}


@dataclass(frozen=True)
class Line:
    """A metric of one run.

    Attributes:
        keys: [n] int64, steps or numbers of buckets of steps, increasing.
        x: [n] float64, positions on the horizontal axis, not decreasing.
        y: [n] float64, finite values.
        run: text that distinguishes the run from others of its group.
    """

    keys: NDArray[np.int64]
    x: Array
    y: Array
    run: str


@dataclass(frozen=True)
class SeedSpread:
    """A metric of a group of runs.

    Attributes:
        x: [n] positions that all runs reach; n is 0 if the runs share none.
        mean, low, high: [n] mean, minimum and maximum over the runs.
        lines: one per run.
        tails: parts of the longer runs that the shortest run does not reach.
    """

    x: Array
    mean: Array
    low: Array
    high: Array
    lines: tuple[Line, ...]
    tails: tuple[Line, ...]


@dataclass(frozen=True)
class Smoothing:
    """Averaging of steps into points.

    Attributes:
        bucket: number of steps that are averaged into one point.
        window: number of latest points in a trailing mean.
    """

    bucket: int = 1
    window: int = 1


def choose_smoothing(runs: Sequence[Run]) -> Smoothing:
    """Return the smoothing for these runs: at most 200 points per curve, and a window of 5 if points are steps."""
    longest = max(run.last_step for run in runs)
    bucket = max(1, -(-longest // _MAX_POINTS))
    return Smoothing(bucket, _WINDOW if bucket == 1 and longest >= 4 * _WINDOW else 1)


def run_line(run: Run, names: Sequence[str], axis: XAxis, smoothing: Smoothing) -> Line | None:
    """Return the first of the metrics that the run has; None if it has none, or does not log the axis."""
    cost_at = dict(cumulative_cost(run, axis))
    points = [point for point in run.points(names) if point[0] in cost_at]
    if not points:
        return None
    points = trailing_mean(points, smoothing.window)
    steps = np.array([step for step, _ in points])
    x = np.array([cost_at[step] for step in steps.tolist()], dtype=np.float64)
    y = np.array([value for _, value in points], dtype=np.float64)
    if smoothing.bucket == 1:
        return Line(steps, x, y, run.name)
    keys, member = np.unique((steps - 1) // smoothing.bucket, return_inverse=True)
    sizes = np.bincount(member)
    return Line(keys, np.bincount(member, x) / sizes, np.bincount(member, y) / sizes, run.name)


def trailing_mean(points: Points, window: int) -> Points:
    """Return, for each point, the mean of the latest `window` points."""
    if not points:
        return []
    sums = np.convolve([value for _, value in points], np.ones(window))[: len(points)]
    counts = np.minimum(np.arange(len(points)) + 1, window)
    return [(step, mean) for (step, _), mean in zip(points, (sums / counts).tolist(), strict=True)]


def cumulative_cost(run: Run, axis: XAxis) -> list[tuple[int, float]]:
    """Return (step, steps, tokens or seconds up to that step); empty if the run does not log them."""
    if axis is XAxis.STEPS:
        return [(step, float(step)) for step in run.record.steps]
    known = dict(run.record.points(COST_METRICS[axis]))
    if not known:
        return []
    sums = np.cumsum([known.get(step, 0.0) for step in run.record.steps])
    return list(zip(run.record.steps, sums.tolist(), strict=True))


def seed_spread(group: Group, names: Sequence[str], axis: XAxis, smoothing: Smoothing) -> SeedSpread | None:
    """Return mean and range over the runs of a group that have the metric; None if none has.

    Against steps, the runs are compared at the steps that all of them logged. Against tokens and time, each run has
    different points: runs are interpolated linearly at the same costs.
    """
    lines = tuple(found for run in group.runs if (found := run_line(run, names, axis, smoothing)) is not None)
    if not lines:
        return None
    if axis is XAxis.STEPS:
        keys = sorted(set.intersection(*(set(line.keys.tolist()) for line in lines)))
        indices = [np.searchsorted(line.keys, keys) for line in lines]
        x = np.mean([line.x[index] for line, index in zip(lines, indices, strict=True)], axis=0)
        ys = np.array([line.y[index] for line, index in zip(lines, indices, strict=True)])
    else:
        x = _shared_costs(lines)
        ys = np.array([np.interp(x, line.x, line.y) for line in lines])
    return SeedSpread(x, ys.mean(axis=0), ys.min(axis=0), ys.max(axis=0), lines, _tails(lines, x))


def _shared_costs(lines: Sequence[Line]) -> Array:
    """Return the costs of all points, within the range that every run covers."""
    first, last = max(line.x[0] for line in lines), min(line.x[-1] for line in lines)
    if first > last:
        return np.empty(0)
    costs = np.unique(np.concatenate([line.x for line in lines] + [np.array([first, last])]))
    return costs[(costs >= first) & (costs <= last)]


def _tails(lines: Sequence[Line], x: Array) -> tuple[Line, ...]:
    """Return the parts of the lines after the last step of the shortest run."""
    end = min(int(line.keys[-1]) for line in lines)
    tails = []
    for line in lines:
        if int(line.keys[-1]) <= end and x.size:
            continue
        after = line.x >= x[-1] if x.size else np.ones(line.x.size, dtype=bool)
        tails.append(replace(line, keys=line.keys[after], x=line.x[after], y=line.y[after]))
    return tuple(tail for tail in tails if tail.x.size)
