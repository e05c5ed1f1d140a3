"""Mean and spread of a metric over the seeds of a group, against steps, tokens or time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from roll_gspo.compare.runs import Group, Run
from roll_gspo.report.curves import trailing_mean

Array = NDArray[np.float64]
_MAX_POINTS = 200
_WINDOW = 5


class Axis(StrEnum):
    """What a metric is drawn against."""

    STEPS = "steps"
    TOKENS = "tokens"
    TIME = "time"


# Sums up to and with a step: what it cost to get there. Tokens include those of groups that were dropped, time
# includes validation and checkpoints.
COSTS = {Axis.TOKENS: "rollout/num_tokens", Axis.TIME: "time/step"}


@dataclass(frozen=True)
class Line:
    """A metric of one run.

    Attributes:
        keys: [n] int, steps or numbers of stretches of steps, increasing.
        x: [n] of the axis, not decreasing.
        y: [n] finite.
    """

    keys: NDArray[np.int64]
    x: Array
    y: Array


@dataclass(frozen=True)
class Spread:
    """A metric of a group.

    Attributes:
        x, mean, low, high: [n]; mean, lowest and highest over the runs, as far as every run reaches; n is 0 where they
            have nothing in common.
        lines: the runs by themselves.
        rest: of runs that got further than others of the group, what they show alone.
    """

    x: Array
    mean: Array
    low: Array
    high: Array
    lines: tuple[Line, ...]
    rest: tuple[Line, ...]


@dataclass(frozen=True)
class Resolution:
    """How much of the steps is seen.

    Attributes:
        stretch: steps that are averaged into one point.
        window: latest points of a run that a smoothed curve averages.
    """

    stretch: int = 1
    window: int = 1


def resolution(runs: Sequence[Run]) -> Resolution:
    """At most 200 points a curve; where a point is one step, and there are enough of them, 5 are smoothed into one."""
    longest = max(run.last_step for run in runs)
    stretch = max(1, -(-longest // _MAX_POINTS))
    return Resolution(stretch, _WINDOW if stretch == 1 and longest >= 4 * _WINDOW else 1)


def line(run: Run, names: Sequence[str], axis: Axis, seen: Resolution) -> Line | None:
    """The first of the metrics that the run has; None where it has none, or no figures for the axis."""
    at = dict(costs(run, axis))
    points = [point for point in run.points(names) if point[0] in at]
    if not points:
        return None
    points = trailing_mean(points, seen.window)
    steps = np.array([step for step, _ in points])
    x = np.array([at[step] for step in steps.tolist()], dtype=np.float64)
    y = np.array([value for _, value in points], dtype=np.float64)
    if seen.stretch == 1:
        return Line(steps, x, y)
    keys, member = np.unique((steps - 1) // seen.stretch, return_inverse=True)
    sizes = np.bincount(member)
    return Line(keys, np.bincount(member, x) / sizes, np.bincount(member, y) / sizes)


def costs(run: Run, axis: Axis) -> list[tuple[int, float]]:
    """(step, what it cost to get there in the unit of the axis); empty where the run does not say."""
    if axis is Axis.STEPS:
        return [(step, float(step)) for step in run.record.steps]
    known = dict(run.record.points(COSTS[axis]))
    if not known:
        return []
    sums = np.cumsum([known.get(step, 0.0) for step in run.record.steps])
    return list(zip(run.record.steps, sums.tolist(), strict=True))


def spread(group: Group, names: Sequence[str], axis: Axis, seen: Resolution) -> Spread | None:
    """Mean, lowest and highest over the runs of a group that have the metric; None where none has.

    Against steps, runs meet at the steps that all of them have. Against tokens and time each run has points of its
    own; they are joined by straight lines and read at the same costs.
    """
    lines = tuple(found for run in group.runs if (found := line(run, names, axis, seen)) is not None)
    if not lines:
        return None
    if axis is Axis.STEPS:
        keys = sorted(set.intersection(*(set(one.keys.tolist()) for one in lines)))
        picked = [np.searchsorted(one.keys, keys) for one in lines]
        x = np.mean([one.x[at] for one, at in zip(lines, picked, strict=True)], axis=0)
        ys = np.array([one.y[at] for one, at in zip(lines, picked, strict=True)])
    else:
        x = _common_costs(lines)
        ys = np.array([np.interp(x, one.x, one.y) for one in lines])
    rest = _rest(lines, x)
    return Spread(x, ys.mean(axis=0), ys.min(axis=0), ys.max(axis=0), lines, rest)


def _common_costs(lines: Sequence[Line]) -> Array:
    """Costs at which some run has a point and every run has some before (or at) and after (or at) it."""
    first, last = max(one.x[0] for one in lines), min(one.x[-1] for one in lines)
    if first > last:
        return np.empty(0)
    everywhere = np.unique(np.concatenate([one.x for one in lines] + [np.array([first, last])]))
    return everywhere[(everywhere >= first) & (everywhere <= last)]


def _rest(lines: Sequence[Line], x: Array) -> tuple[Line, ...]:
    """What runs show beyond the last step of the run that got least far."""
    end = min(int(one.keys[-1]) for one in lines)
    rest = []
    for one in lines:
        if int(one.keys[-1]) <= end and x.size:
            continue
        beyond = one.x >= x[-1] if x.size else np.ones(one.x.size, dtype=bool)
        rest.append(Line(one.keys[beyond], one.x[beyond], one.y[beyond]))
    return tuple(found for found in rest if found.x.size)
