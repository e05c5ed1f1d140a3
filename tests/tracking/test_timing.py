from __future__ import annotations

import time

import pytest

from roll_gspo.tracking.memory import rss_mb
from roll_gspo.tracking.timing import StageTimer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_timer_charges_every_second_once() -> None:
    clock = Clock()
    timer = StageTimer(clock)
    clock.now += 1
    with timer.stage("update"):
        clock.now += 10
        with timer.stage("sync_weights"):
            clock.now += 100
        clock.now += 1000
    with timer.stage("update"):
        clock.now += 10000
    assert timer.lap() == {
        "time/step": 11111.0,
        "time/other": 1.0,
        "time/update": 11010.0,
        "time/sync_weights": 100.0,
    }


def test_timer_lap_starts_the_next_step() -> None:
    clock = Clock()
    timer = StageTimer(clock)
    clock.now = 5
    assert timer.lap() == {"time/step": 5.0, "time/other": 5.0}
    with timer.stage("save"):
        clock.now = 7
    assert timer.lap() == {"time/step": 2.0, "time/other": 0.0, "time/save": 2.0}


def test_timer_closes_a_stage_that_fails() -> None:
    clock = Clock()
    timer = StageTimer(clock)
    with pytest.raises(ValueError, match="x"), timer.stage("score"):
        clock.now = 2
        raise ValueError("x")
    clock.now = 3
    assert timer.lap() == {"time/step": 3.0, "time/other": 1.0, "time/score": 2.0}


def test_timer_measures_real_seconds() -> None:
    timer = StageTimer()
    with timer.stage("generate"):
        time.sleep(0.05)
    assert 0.05 <= timer.lap()["time/generate"] < 5


def test_rss_grows_with_what_is_held() -> None:
    before = rss_mb()
    held = bytearray(b"x" * (64 * 2**20))
    assert 40 < rss_mb() - before < 200
    assert before > 5
    del held
