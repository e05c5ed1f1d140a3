"""Scoring in the background: early, several at once, in order, without a thread that stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from roll_gspo.errors import RewardError
from roll_gspo.rewards import RewardPool, RewardRequest, reward_spec
from roll_gspo.roles.scoring import Scoring

MINE = """
import os, time
def number(prompt, response, ground_truth): return float(response)
def waits_for_a_file(prompt, response, ground_truth):
    while not os.path.exists(ground_truth): time.sleep(0.01)
    return float(response)
class DiesOnceBuilt:
    def __init__(self):
        if os.path.exists("broken"): raise OSError("the licence has run out")
    def __call__(self, prompt, response, ground_truth): os._exit(1)
"""


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, RewardPool]]:
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    names = {"fast": "number", "slow": "waits_for_a_file", "mortal": "DiesOnceBuilt"}
    made = {
        domain: RewardPool(reward_spec(f"my_rewards.{name}", {}, domain), 1, 60.0, f"rewards.{domain}")
        for domain, name in names.items()
    }
    yield made
    for pool in made.values():
        pool.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("score ")]


def ask(response: object, truth: str = "") -> RewardRequest:
    return RewardRequest("p", str(response), truth)


def test_results_are_in_order_however_samples_came(pools: dict[str, RewardPool]) -> None:
    Path("there").touch()
    with Scoring(pools) as scoring:
        for index in (7, 3, 0, 5, 1, 6, 2, 4):
            scoring.submit(index, "slow" if index % 2 else "fast", ask(index, "there"))
        seen: list[tuple[int, int]] = []
        results = scoring.results(lambda *counts: seen.append(counts))
    assert [result.score for result in results] == list(range(8))
    assert seen == sorted(seen) and seen[-1] == (8, 8)


def test_domains_are_scored_at_once_and_a_busy_one_holds_up_nobody(pools: dict[str, RewardPool]) -> None:
    for domain in ("fast", "slow"):
        pools[domain].check()
    with Scoring(pools) as scoring:
        for index in range(100):  # all of them wait for the first
            scoring.submit(index, "slow", ask(index, "later"))
        scoring.submit(100, "fast", ask(100))
        deadline = time.monotonic() + 60
        while not scoring.num_scored:
            assert time.monotonic() < deadline, "the fast domain's sample was not scored within 60 s"
            time.sleep(0.01)
        Path("later").touch()
        assert [result.score for result in scoring.results()] == list(range(101))
    assert 0 < scoring.time.hidden_s < scoring.time.total_s


def test_error_in_the_background_is_raised_by_the_next_call(pools: dict[str, RewardPool]) -> None:
    pools["mortal"].check()
    Path("broken").touch()  # the process that replaces the first one cannot be built
    with Scoring(pools) as scoring, pytest.raises(RewardError, match=r"rewards\.mortal.*the licence has run out"):
        scoring.submit(0, "mortal", ask(1))
        scoring.results()
    with Scoring(pools) as scoring, pytest.raises(RewardError, match=r"rewards\.mortal.*the licence has run out"):
        scoring.submit(0, "mortal", ask(1))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # as if generation went on
            scoring.submit(1, "fast", ask(1))
            time.sleep(0.01)


@pytest.mark.parametrize("error", [ValueError("generation failed"), KeyboardInterrupt()])
def test_failure_of_the_caller_ends_the_scoring(pools: dict[str, RewardPool], error: BaseException) -> None:
    with pytest.raises(type(error)), Scoring(pools) as scoring:
        scoring.submit(0, "slow", ask(1, "never"))
        scoring.submit(1, "fast", ask(1))
        raise error
    with Scoring(pools) as scoring:  # and the pools serve on, without an answer to what was given up
        scoring.submit(0, "fast", ask(5))
        assert [result.score for result in scoring.results()] == [5.0]


def test_finished_results_are_taken_while_others_are_scored(pools: dict[str, RewardPool]) -> None:
    with Scoring(pools) as scoring:
        assert scoring.take_finished(60.0) == [] and scoring.num_unfinished == 0, "there is nothing to wait for"
        scoring.submit(0, "slow", ask(10, "later"))
        for index in (3, 1, 2):
            scoring.submit(index, "fast", ask(index))
        found = take(scoring, 3)
        assert found == {1: 1.0, 2: 2.0, 3: 3.0} and scoring.num_unfinished == 1
        assert scoring.take_finished() == []
        assert scoring.time.hidden_s == scoring.time.total_s > 0
        scoring.submit(4, "fast", ask(4))
        Path("later").touch()
        assert take(scoring, 2) == {0: 10.0, 4: 4.0} and scoring.num_unfinished == 0
        scoring.submit(5, "fast", ask(5))
        assert [result.score for result in scoring.results()] == [5.0], "the results that were not taken"
        assert scoring.num_scored == 6 and scoring.num_unfinished == 0


def take(scoring: Scoring, number: int) -> dict[int, float]:
    """Take `number` results; each must be returned once."""
    found: dict[int, float] = {}
    deadline = time.monotonic() + 60
    while len(found) < number:
        for index, result in scoring.take_finished(0.1):
            assert index not in found and result.failed is None
            found[index] = result.score
        assert time.monotonic() < deadline, f"{len(found)} of {number} samples were scored within 60 s"
    return found


def test_scorings_of_two_threads_share_the_pools(pools: dict[str, RewardPool]) -> None:
    Path("there").touch()
    rollouts: dict[int, float] = {}
    validated = threading.Event()

    def roll() -> None:
        """Keep one scoring open, with samples that are outstanding until validation has ended."""
        with Scoring(pools) as scoring:
            for index in range(200):
                scoring.submit(index, "fast" if index % 2 else "slow", ask(index, "there"))
            scoring.submit(200, "slow", ask(200, "later"))
            rollouts.update(take(scoring, 200))
            assert validated.wait(60)
            rollouts.update(take(scoring, 1))

    thread = threading.Thread(target=roll)
    thread.start()
    for _ in range(3):
        with Scoring(pools) as scoring:
            for index in (2, 0, 1):
                scoring.submit(index, "fast", ask(1000 + index))
            assert [result.score for result in scoring.results()] == [1000.0, 1001.0, 1002.0]
    with pytest.raises(ValueError, match="given up"), Scoring(pools) as scoring:
        scoring.submit(0, "fast", ask(1))
        raise ValueError("given up")
    Path("later").touch()
    validated.set()
    thread.join(60)
    assert rollouts == {index: float(index) for index in range(201)}


def test_failure_is_raised_while_results_are_taken(pools: dict[str, RewardPool]) -> None:
    pools["mortal"].check()
    Path("broken").touch()
    with Scoring(pools) as scoring, pytest.raises(RewardError, match=r"rewards\.mortal.*the licence has run out"):
        scoring.submit(0, "mortal", ask(1))
        take(scoring, 1)


def test_next_step_logs_failures_and_starts_servers(
    pools: dict[str, RewardPool], caplog: pytest.LogCaptureFixture
) -> None:
    starts: list[int] = []
    with Scoring(pools, lambda: starts.append(len(caplog.messages))) as scoring:
        for step in range(2):
            scoring.submit(2 * step, "fast", ask("not a number"))
            scoring.submit(2 * step + 1, "fast", ask(1))
            while scoring.num_unfinished:
                scoring.take_finished(1.0)
            scoring.next_step()
    assert [message.split(", first")[0] for message in caplog.messages] == ["rewards.fast: 1 of 2 samples failed"] * 2
    assert starts == [0, 1]
