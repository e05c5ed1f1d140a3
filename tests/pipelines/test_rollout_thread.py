"""The thread that pumps a stream: errors, waits without progress, its end, and other clients of the engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from rollout_cases import SAMPLING, Run, stream_settings

from roll_gspo.errors import RewardError, WorkerHungError
from roll_gspo.pipelines.rlvr.rollout_thread import RolloutThread
from roll_gspo.strategies.base import FinishedRequest, GenerationRequest


@pytest.fixture
def run() -> Run:
    return Run(stream_settings(1, num_steps=3, in_flight=True))


@pytest.fixture
def thread(run: Run) -> Iterator[RolloutThread]:
    thread = RolloutThread(run.stream, timeout_s=20.0)
    yield thread
    thread.stop()


def serve() -> None: ...


def fail(seconds: float) -> list[FinishedRequest]:
    raise RewardError("rewards.math: cannot be started")


def wait_for_end(thread: RolloutThread) -> None:
    thread._thread.join(20)
    assert not thread._thread.is_alive()


def test_error_reaches_the_wait_that_is_running(run: Run, thread: RolloutThread) -> None:
    def fail_now() -> None:
        run.engine.advance = fail  # type: ignore[method-assign]

    run.engine.capacity = 0  # nothing ends before
    thread.start()
    with pytest.raises(RewardError, match="cannot be started"):
        thread.wait(lambda: False, "a batch", fail_now)


def test_error_between_two_waits_reaches_the_next_one(run: Run, thread: RolloutThread) -> None:
    run.engine.advance = fail  # type: ignore[method-assign]
    thread.start()
    wait_for_end(thread)
    for _ in range(2):
        thread.start()
        with pytest.raises(RewardError, match="cannot be started"):
            thread.wait(lambda: True, "a batch", serve)


def test_wait_without_progress_names_what_it_waited_for(run: Run) -> None:
    run.engine.capacity = 0  # nothing ends
    thread = RolloutThread(run.stream, timeout_s=0.2)
    thread.start()
    with pytest.raises(WorkerHungError, match=r"no score arrived within 0.2 s while waiting for the samples of a step"):
        thread.wait(run.stream.has_batch, "the samples of a step", serve)
    thread.stop()
    wait_for_end(thread)


def test_stopped_thread_does_not_start_again(run: Run, thread: RolloutThread) -> None:
    thread.start()
    thread.wait(run.stream.has_batch, "a batch", serve)
    thread.stop()
    thread.stop()
    wait_for_end(thread)
    thread.start()
    assert not thread._thread.is_alive()


def test_thread_trains_all_steps_and_then_sleeps(
    run: Run, thread: RolloutThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = run.stream
    for step in range(1, 4):
        thread.start()
        thread.wait(stream.has_batch, "a batch", serve)
        found = stream.next_batch()
        assert found is not None
        with stream.changing_weights():
            run.generator.update_weights(None, step)  # type: ignore[arg-type]
        stream.trained(found.groups)
    slept = threading.Event()
    wait = stream.changed.wait

    def sleep(timeout: float | None = None) -> bool:
        slept.set()
        return wait(timeout)

    monkeypatch.setattr(stream.changed, "wait", sleep)
    assert slept.wait(20), "it waits for a change instead of polling"
    assert not stream.groups and stream.num_generating == stream.num_scoring == 0


def test_another_client_uses_the_engine_at_the_same_time(run: Run, thread: RolloutThread) -> None:
    client = run.generator.open_stream(urgent=True)
    found: dict[int, Any] = {}
    thread.start()
    for part in range(3):
        client.submit([GenerationRequest(10 * part + i, (1, 2), SAMPLING, i) for i in range(10)])
        while client.outstanding:
            found |= dict(client.poll(0.05))
    thread.wait(run.stream.has_batch, "a batch", serve)
    assert len(found) == 30
    assert all(found[key].token_ids == found[key % 10].token_ids for key in found)
    assert run.stream.num_taken >= 12
