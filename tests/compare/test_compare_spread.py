from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from compared_runs import figures, write_run

from roll_gspo.compare.runs import Group, group_runs, load_run
from roll_gspo.compare.spread import Axis, Resolution, costs, resolution, spread

EVERY_STEP = Resolution()
SCORE = ("rollout/score_mean", "reward/score_mean")
Row = Callable[[int], Mapping[str, float]]


def group_of(folder: Path, *rows: Row, steps: tuple[int, ...] = (20,)) -> Group:
    """One group with a run for each of the rows."""
    lengths = steps * len(rows) if len(steps) == 1 else steps
    runs = [
        load_run(write_run(folder / str(seed), seed=seed, steps=length, row=row))
        for seed, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    (group,) = group_runs(runs)
    return group


def test_spread_over_steps_is_mean_lowest_and_highest(tmp_path: Path) -> None:
    rows = [lambda step, s=s: figures(step, s) for s in (0.0, 0.1, 0.5)]
    seen = spread(group_of(tmp_path, *rows), SCORE, Axis.STEPS, EVERY_STEP)
    assert seen is not None and not seen.rest
    score = 0.2 + 0.01 * np.arange(1, 21)
    np.testing.assert_allclose(seen.x, np.arange(1, 21))
    np.testing.assert_allclose(seen.mean, score + 0.2)
    np.testing.assert_allclose(seen.low, score)
    np.testing.assert_allclose(seen.high, score + 0.5)


def test_metric_falls_back_to_the_next_name(tmp_path: Path) -> None:
    def old(step: int) -> dict[str, float]:
        return {name: value for name, value in figures(step).items() if name != "rollout/score_mean"}

    seen = spread(group_of(tmp_path, old), SCORE, Axis.STEPS, EVERY_STEP)
    assert seen is not None
    assert set(seen.mean.tolist()) == {0.9}
    assert spread(group_of(tmp_path / "b", old), ("critic/loss",), Axis.STEPS, EVERY_STEP) is None


def test_costs_add_up_with_what_an_early_validation_did_not_count(tmp_path: Path) -> None:
    (run,) = group_of(tmp_path, lambda step: figures(step, tokens=100.0 * step, seconds=3.0)).runs
    assert costs(run, Axis.STEPS)[:3] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert costs(run, Axis.TOKENS)[:4] == [(0, 0.0), (1, 100.0), (2, 300.0), (3, 600.0)]
    assert costs(run, Axis.TIME)[-1] == (20, 60.0)


@pytest.mark.parametrize("axis", [Axis.TOKENS, Axis.TIME])
def test_spread_over_costs_reads_every_run_at_the_same_cost(tmp_path: Path, axis: Axis) -> None:
    """The second run spends twice as much a step: at equal cost it is at half the step."""
    rows = [lambda step, f=f: figures(step, tokens=1000.0 * f, seconds=2.0 * f) for f in (1.0, 2.0)]
    seen = spread(group_of(tmp_path, *rows), SCORE, axis, EVERY_STEP)
    assert seen is not None
    unit = {Axis.TOKENS: 1000.0, Axis.TIME: 2.0}[axis]
    np.testing.assert_allclose(seen.x, unit * np.arange(2, 21))
    np.testing.assert_allclose(seen.high, 0.2 + 0.01 * np.arange(2, 21))
    np.testing.assert_allclose(seen.low, 0.2 + 0.01 * np.arange(2, 21) / 2)


@pytest.mark.parametrize("axis", list(Axis))
def test_mean_ends_with_the_shortest_run_and_the_others_go_on_alone(tmp_path: Path, axis: Axis) -> None:
    rows = [lambda step, s=s: figures(step, s) for s in (0.0, 0.2)]
    seen = spread(group_of(tmp_path, *rows, steps=(8, 20)), SCORE, axis, EVERY_STEP)
    assert seen is not None
    unit = {Axis.STEPS: 1.0, Axis.TOKENS: 1000.0, Axis.TIME: 2.0}[axis]
    assert seen.x[-1] == 8 * unit
    np.testing.assert_allclose(seen.mean[-1], 0.2 + 0.08 + 0.1)
    (alone,) = seen.rest
    assert (alone.x[0], alone.x[-1], alone.keys[-1]) == (8 * unit, 20 * unit, 20)
    np.testing.assert_allclose(alone.y[-1], 0.2 + 0.2 + 0.2)


def test_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    rows = [lambda step, b=b: figures(step) | ({"actor/entropy": float("nan")} if step == b else {}) for b in (3, 7)]
    seen = spread(group_of(tmp_path, *rows), ("actor/entropy",), Axis.STEPS, EVERY_STEP)
    assert seen is not None
    assert seen.x.tolist() == [step for step in range(1, 21) if step not in (3, 7)]
    assert np.isfinite([seen.mean, seen.low, seen.high]).all()


def test_runs_without_a_common_step_are_drawn_alone(tmp_path: Path) -> None:
    rows = [lambda step, o=o: figures(step) if step % 2 == o else {"time/step": 1.0} for o in (0, 1)]
    seen = spread(group_of(tmp_path, *rows), ("actor/entropy",), Axis.STEPS, EVERY_STEP)
    assert seen is not None
    assert seen.x.size == 0 and len(seen.rest) == 2


def test_a_run_without_costs_is_not_drawn_against_them(tmp_path: Path) -> None:
    group = group_of(tmp_path, lambda step: {"rollout/score_mean": 0.5})
    assert spread(group, SCORE, Axis.TOKENS, EVERY_STEP) is None
    assert spread(group, SCORE, Axis.STEPS, EVERY_STEP) is not None


def test_smoothing_averages_the_latest_points(tmp_path: Path) -> None:
    seen = spread(group_of(tmp_path, figures), SCORE, Axis.STEPS, Resolution(window=5))
    assert seen is not None
    np.testing.assert_allclose(seen.mean[:2], [0.21, 0.215])
    np.testing.assert_allclose(seen.mean[-1], 0.2 + 0.01 * 18)


@pytest.mark.parametrize(("steps", "expected"), [(3, (1, 1)), (20, (1, 5)), (200, (1, 5)), (450, (3, 1))])
def test_resolution_limits_the_points_of_a_curve(tmp_path: Path, steps: int, expected: tuple[int, int]) -> None:
    group = group_of(tmp_path, figures, steps=(steps,))
    seen = resolution(group.runs)
    assert (seen.stretch, seen.window) == expected
    drawn = spread(group, SCORE, Axis.STEPS, seen)
    assert drawn is not None and drawn.x.size == -(-steps // seen.stretch) <= 200
    if seen.stretch > 1:
        np.testing.assert_allclose((drawn.x[0], drawn.mean[0]), (2.0, 0.22))  # of steps 1, 2 and 3
