"""Scoring in the background: early, in order, without a thread that stays."""

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
