from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from compared_runs import all_metrics, write_run

from roll_gspo.compare.runs import Group, group_runs, load_run
from roll_gspo.compare.seed_spread import Smoothing, XAxis, choose_smoothing, cumulative_cost, seed_spread
from roll_gspo.report.run_folder import SCORE

UNSMOOTHED = Smoothing()
Row = Callable[[int], Mapping[str, float]]


def group_of(folder: Path, *rows: Row, steps: tuple[int, ...] = (20,)) -> Group:
    """Write a run per row, and return their group."""
    lengths = steps * len(rows) if len(steps) == 1 else steps
    runs = [
        load_run(write_run(folder / str(seed), seed=seed, steps=length, row=row))
        for seed, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    (group,) = group_runs(runs)
    return group


def test_spread_over_steps_is_mean_minimum_and_maximum(tmp_path: Path) -> None:
    rows = [lambda step, s=s: all_metrics(step, s) for s in (0.0, 0.1, 0.5)]
    found = seed_spread(group_of(tmp_path, *rows), SCORE, XAxis.STEPS, UNSMOOTHED)
    assert found is not None and not found.tails
    score = 0.2 + 0.01 * np.arange(1, 21)
    np.testing.assert_allclose(found.x, np.arange(1, 21))
    np.testing.assert_allclose(found.mean, score + 0.2)
    np.testing.assert_allclose(found.low, score)
    np.testing.assert_allclose(found.high, score + 0.5)


def test_spread_uses_the_first_metric_that_was_logged(tmp_path: Path) -> None:
    def old(step: int) -> dict[str, float]:
        return {name: value for name, value in all_metrics(step).items() if name != "rollout/score_mean"}

    found = seed_spread(group_of(tmp_path, old), SCORE, XAxis.STEPS, UNSMOOTHED)
    assert found is not None
    assert set(found.mean.tolist()) == {0.9}
    assert seed_spread(group_of(tmp_path / "b", old), ("critic/loss",), XAxis.STEPS, UNSMOOTHED) is None


def test_costs_are_cumulative_and_start_at_zero(tmp_path: Path) -> None:
    (run,) = group_of(tmp_path, lambda step: all_metrics(step, tokens=100.0 * step, seconds=3.0)).runs
    assert cumulative_cost(run, XAxis.STEPS)[:3] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert cumulative_cost(run, XAxis.TOKENS)[:4] == [(0, 0.0), (1, 100.0), (2, 300.0), (3, 600.0)]
    assert cumulative_cost(run, XAxis.TIME)[-1] == (20, 60.0)


@pytest.mark.parametrize("axis", [XAxis.TOKENS, XAxis.TIME])
def test_spread_over_costs_interpolates_all_runs_at_the_same_cost(tmp_path: Path, axis: XAxis) -> None:
    """The second run spends twice as much per step: at equal cost it is at half the step."""
    rows = [lambda step, f=f: all_metrics(step, tokens=1000.0 * f, seconds=2.0 * f) for f in (1.0, 2.0)]
    found = seed_spread(group_of(tmp_path, *rows), SCORE, axis, UNSMOOTHED)
    assert found is not None
    unit = {XAxis.TOKENS: 1000.0, XAxis.TIME: 2.0}[axis]
    np.testing.assert_allclose(found.x, unit * np.arange(2, 21))
    np.testing.assert_allclose(found.high, 0.2 + 0.01 * np.arange(2, 21))
    np.testing.assert_allclose(found.low, 0.2 + 0.01 * np.arange(2, 21) / 2)


@pytest.mark.parametrize("axis", list(XAxis))
def test_mean_ends_with_the_shortest_run_and_others_have_tails(tmp_path: Path, axis: XAxis) -> None:
    rows = [lambda step, s=s: all_metrics(step, s) for s in (0.0, 0.2)]
    found = seed_spread(group_of(tmp_path, *rows, steps=(8, 20)), SCORE, axis, UNSMOOTHED)
    assert found is not None
    unit = {XAxis.STEPS: 1.0, XAxis.TOKENS: 1000.0, XAxis.TIME: 2.0}[axis]
    assert found.x[-1] == 8 * unit
    np.testing.assert_allclose(found.mean[-1], 0.2 + 0.08 + 0.1)
    (tail,) = found.tails
    assert (tail.x[0], tail.x[-1], tail.keys[-1]) == (8 * unit, 20 * unit, 20)
    np.testing.assert_allclose(tail.y[-1], 0.2 + 0.2 + 0.2)


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    rows = [
        lambda step, b=b: all_metrics(step) | ({"actor/entropy": float("nan")} if step == b else {}) for b in (3, 7)
    ]
    found = seed_spread(group_of(tmp_path, *rows), ("actor/entropy",), XAxis.STEPS, UNSMOOTHED)
    assert found is not None
    assert found.x.tolist() == [step for step in range(1, 21) if step not in (3, 7)]
    assert np.isfinite([found.mean, found.low, found.high]).all()


def test_runs_without_a_common_step_have_tails_only(tmp_path: Path) -> None:
    rows = [lambda step, o=o: all_metrics(step) if step % 2 == o else {"time/step": 1.0} for o in (0, 1)]
    found = seed_spread(group_of(tmp_path, *rows), ("actor/entropy",), XAxis.STEPS, UNSMOOTHED)
    assert found is not None
    assert found.x.size == 0 and len(found.tails) == 2


def test_run_that_does_not_log_a_cost_has_no_spread_over_it(tmp_path: Path) -> None:
    group = group_of(tmp_path, lambda step: {"rollout/score_mean": 0.5})
    assert seed_spread(group, SCORE, XAxis.TOKENS, UNSMOOTHED) is None
    assert seed_spread(group, SCORE, XAxis.STEPS, UNSMOOTHED) is not None


def test_window_averages_the_latest_points(tmp_path: Path) -> None:
    found = seed_spread(group_of(tmp_path, all_metrics), SCORE, XAxis.STEPS, Smoothing(window=5))
    assert found is not None
    np.testing.assert_allclose(found.mean[:2], [0.21, 0.215])
    np.testing.assert_allclose(found.mean[-1], 0.2 + 0.01 * 18)


@pytest.mark.parametrize(("steps", "expected"), [(3, (1, 1)), (20, (1, 5)), (200, (1, 5)), (450, (3, 1))])
def test_smoothing_limits_the_points_of_a_curve(tmp_path: Path, steps: int, expected: tuple[int, int]) -> None:
    group = group_of(tmp_path, all_metrics, steps=(steps,))
    smoothing = choose_smoothing(group.runs)
    assert (smoothing.bucket, smoothing.window) == expected
    found = seed_spread(group, SCORE, XAxis.STEPS, smoothing)
    assert found is not None and found.x.size == -(-steps // smoothing.bucket) <= 200
    if smoothing.bucket > 1:
        np.testing.assert_allclose((found.x[0], found.mean[0]), (2.0, 0.22))  # of steps 1, 2 and 3
