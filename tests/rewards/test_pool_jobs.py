"""Jobs of a reward pool: results as they arrive, several jobs at once, and bounded memory."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from roll_gspo.errors import RewardError
from roll_gspo.rewards import RewardPool, RewardRequest, RewardResult, reward_spec
from roll_gspo.rewards.failures import FailureSummary
from roll_gspo.rewards.job import JobQueue, Sample, ScoringJob

MINE = """
import os, time
def number(prompt, response, ground_truth): return float(response)
def waits(prompt, response, ground_truth):
    if response == "die": os._exit(3)
    if response == "hang": time.sleep(600)
    while ground_truth and not os.path.exists(ground_truth): time.sleep(0.01)
    with open("order", "a") as file: file.write(prompt)
    return float(response)
class Batch:
    def score_batch(self, requests):
        responses = [request.response for request in requests]
        if "die" in responses: os._exit(3)
        return [float(response) for response in responses]
"""
TIMEOUT_S = 20.0


@pytest.fixture(autouse=True)
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write the rewards to the working directory. No thread of a pool may be left."""
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("score ")]


def make_pool(name: str, num_workers: int = 1, timeout_s: float = TIMEOUT_S, max_batch: int = 32) -> RewardPool:
    spec = reward_spec(f"my_rewards.{name}", {}, "rewards.x")
    return RewardPool(spec, num_workers, timeout_s, "rewards.x", max_batch=max_batch)


def ask(response: object, truth: str = "", prompt: str = "p") -> RewardRequest:
    return RewardRequest(prompt, str(response), truth, {"id": f"row {response}"})


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within 60 s"
        time.sleep(0.005)


def finish(job: ScoringJob) -> dict[int, RewardResult]:
    job.finish()
    assert job.ended.wait(60)
    job.raise_failure()
    return dict(job.take())


def test_results_arrive_before_others_finish() -> None:
    with make_pool("waits", num_workers=2, max_batch=1) as pool, pool.open() as job:
        job.submit(7, ask(1, truth="later"))
        for key in range(4):
            job.submit(key, ask(key))
        found: dict[int, RewardResult] = {}
        wait_for(lambda: found.update(job.take()) or len(found) == 4, "the samples that do not wait")
        assert found == {key: RewardResult(float(key)) for key in range(4)} and job.num_scored == 4
        assert job.time.hidden_s == job.time.total_s > 0
        Path("later").touch()
        assert finish(job) == {7: RewardResult(1.0)}, "each result is returned once"
        assert job.take() == [] and job.num_scored == job.num_submitted == 5
        assert job.time.hidden_s < job.time.total_s


def test_jobs_of_two_threads_have_the_results_of_one_after_the_other() -> None:
    numbers = {"rollouts": range(300), "validation": range(1000, 1200)}
    found: dict[str, list[RewardResult]] = {}
    with make_pool("number", num_workers=2) as pool:

        def score(name: str) -> None:
            found[name] = pool.score([ask(number) for number in numbers[name]])

        threads = [threading.Thread(target=score, args=(name,)) for name in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == {name: pool.score([ask(n) for n in of_job]) for name, of_job in numbers.items()}


def test_jobs_take_turns() -> None:
    with make_pool("waits", max_batch=4) as pool, pool.open() as rollouts:
        pool.check()
        for key in range(400):
            rollouts.submit(key, ask(key, truth="start", prompt="r"))
        wait_for(lambda: rollouts.queue.num_served, "a sample is assigned")
        with pool.open() as validation:
            for key in range(20):
                validation.submit(key, ask(key, truth="start", prompt="v"))
            Path("start").touch()
            assert len(finish(validation)) == 20
        order = Path("order").read_text()
        assert order[0] == "r" and order.index("v") <= 4, "the samples that were assigned first"
        assert order[: order.rindex("v")].count("r") <= 20 + 2 * 4, "validation waited for more than its share"
        assert len(finish(rollouts)) == 400


def test_queue_that_was_empty_gets_no_credit() -> None:
    def with_requests(number: int, num_served: int) -> JobQueue:
        job = ScoringJob("rewards.x", lambda: None, threading.Condition())
        for key in range(number):
            job.submit(key, ask(key))
        job.queue.drain(num_served)
        return job.queue

    first, second = with_requests(20, 0), with_requests(20, 1000)
    assert (first.num_served, second.num_served) == (0, 1000)
    taken = first.take(8)
    assert [sample.number for sample in taken] == list(range(8)) and first.num_served == 8
    first.requeue(taken)
    assert first.num_served == 0 and [sample.number for sample in first.pending] == list(range(20))


def test_cancelled_job_leaves_the_other_alone() -> None:
    with make_pool("waits", num_workers=2, max_batch=1) as pool, pool.open() as kept:
        pool.check()
        with pool.open() as cancelled:
            cancelled.submit(0, ask(0, truth="never"))
            kept.submit(0, ask(10, truth="later"))
            wait_for(lambda: kept.queue.num_served and cancelled.queue.num_served, "both are assigned")
            before = set(pool.pids)
        assert cancelled.ended.is_set() and cancelled.error is None
        assert len(before & set(pool.pids)) == 1, "only the worker of the cancelled job is killed"
        for key in range(1, 20):
            kept.submit(key, ask(10 + key))
        Path("later").touch()
        assert finish(kept) == {key: RewardResult(10.0 + key) for key in range(20)}


@pytest.mark.parametrize("reward", ["waits", "Batch"])
def test_dead_worker_affects_only_its_batch(reward: str) -> None:
    with make_pool(reward, num_workers=2, max_batch=4) as pool, pool.open() as first, pool.open() as second:
        for key in range(40):
            first.submit(key, ask("die" if key in (5, 23) else key))
            second.submit(key, ask(100 + key))
        assert finish(second) == {key: RewardResult(100.0 + key) for key in range(40)}
        found = finish(first)
    assert {key for key, result in found.items() if result.failed} == {5, 23}
    assert "exit code 3" in (found[5].failed or "")
    assert all(found[key] == RewardResult(float(key)) for key in set(range(40)) - {5, 23})


def test_timeout_fails_the_sample_of_its_job_only() -> None:
    with make_pool("waits", timeout_s=1.0) as pool, pool.open() as first, pool.open() as second:
        first.submit(0, ask("hang"))
        first.submit(1, ask(1))
        second.submit(0, ask(2))
        assert finish(second) == {0: RewardResult(2.0)}
        assert finish(first) == {0: RewardResult(0.0, "timeout after 1 s"), 1: RewardResult(1.0)}


def test_worker_killed_from_outside_is_retried_in_both_jobs() -> None:
    with make_pool("waits", num_workers=2, max_batch=1) as pool, pool.open() as first, pool.open() as second:
        pool.check()
        for job in (first, second):
            for key in range(3):
                job.submit(key, ask(key, truth="later"))
        wait_for(lambda: first.queue.num_served and second.queue.num_served, "both are assigned")
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        Path("later").touch()
        assert finish(first) == finish(second) == {key: RewardResult(float(key)) for key in range(3)}


def test_failed_start_ends_all_jobs_and_closing_does_too() -> None:
    with make_pool("absent") as pool, pool.open() as first, pool.open() as second:
        first.submit(0, ask(1))
        for job in (first, second):
            assert job.ended.wait(60)
            with pytest.raises(Exception, match=r"^rewards\.x: .*'absent'"):
                job.raise_failure()
    pool = make_pool("waits")
    job = pool.open()
    job.submit(0, ask(0, truth="never"))
    wait_for(lambda: job.queue.num_served, "the sample is assigned")
    pool.close()
    with pytest.raises(RewardError, match=r"^rewards\.x: .*closed"):
        job.raise_failure()
    assert not pool.pids


def count_objects() -> int:
    return sum(type(thing) in (Sample, RewardRequest, RewardResult) for thing in gc.get_objects())


def test_long_job_keeps_no_request_and_no_result() -> None:
    """Score 20,000 samples through one job, and count the objects that are left."""
    gc.collect()
    limit, changed, before = 256, threading.Condition(), count_objects()
    found: Counter[float] = Counter()

    def take_one_or_more(job: ScoringJob) -> None:
        with changed:
            assert changed.wait_for(lambda: job.has_results, 60)
        found.update(result.score for _, result in job.take())

    with make_pool("number", num_workers=2) as pool, pool.open(changed) as job:
        for key in range(20_000):
            job.submit(key, ask(key % 7))
            while job.num_submitted - found.total() >= limit:
                take_one_or_more(job)
            if key == 10_000:
                assert count_objects() - before <= 3 * limit
        while job.num_submitted > found.total():
            take_one_or_more(job)
        wait_for(lambda: count_objects() <= before, "the pool forgets the last samples")
    assert found == Counter(float(key % 7) for key in range(20_000))


def test_failures_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with make_pool("number") as pool, pool.open() as job:
        job.submit(0, ask(1))
        job.submit(1, ask("x"))
        wait_for(lambda: job.num_scored == 2, "both are scored")
        job.log_failures()
        job.log_failures()
        job.submit(2, ask("y"))
        finish(job)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "rewards.x: 1 of 2 samples failed, first (row row x): ValueError: could not convert string to float: 'x'",
        "rewards.x: 1 of 1 samples failed, first (row row y): ValueError: could not convert string to float: 'y'",
    ]


def test_summary_of_failures_does_not_depend_on_the_order() -> None:
    results = [RewardResult(0.0, f"reason {number % 3}") for number in range(9)] + [RewardResult(1.0)]
    texts = set()
    for order in (range(10), reversed(range(10))):
        summary = FailureSummary("rewards.x")
        for number in order:
            summary.add(number, ask(number), results[number])
        texts.add(summary.take_text())
    assert texts == {
        "rewards.x: 9 of 10 samples failed, first (row row 0): reason 0; 3 times: reason 1; 3 times: reason 2"
    }
    assert summary.take_text() is None
