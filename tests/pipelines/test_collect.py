"""Collecting a batch: which groups each domain drops, and what is told of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from counting_engine import CountingEngine, token

from roll_gspo.algorithms.query_filter import QueryFilterSettings
from roll_gspo.batch import Completion, Prompt
from roll_gspo.config.rewards import RewardConfig
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.pipelines.rlvr.collect import Collector
from roll_gspo.pipelines.rlvr.rollout_stream import RolloutStream
from roll_gspo.pipelines.rlvr.stream_settings import StreamSettings
from roll_gspo.roles.generator import Generator, sample_seeds
from roll_gspo.roles.local_stream import LocalStream
from roll_gspo.roles.reward_manager import RewardManager
from roll_gspo.strategies.base import Sampling
from roll_gspo.tracking.console import Progress

MINE = """
from roll_gspo.rewards import RewardOutput

def scores(prompt, response, ground_truth, of):
    # `of` holds the score of each sample of the group, None where it fails; the response begins with its number
    score = of[int(response[0])]
    if score is None:
        raise ValueError("no opinion")
    return RewardOutput(score, components={"part": score / 2})
"""
GROUPS = {
    "strict": {"equal": [1, 1, 1], "different": [0, 1, 1], "one left": [None, 2, None], "equal left": [1, None, 1]},
    "open": {"equal": [1, 1, 1], "none left": [None, None, None]},
}


# The engine's first token contains the seed, so that the text shows the number of the sample.
PROMPT, SAMPLES = (5, 6), 3
FIRST_SEED = sample_seeds(0, "step 1", 1, SAMPLES)[0]


def text_of(completion: Completion) -> str:
    """Return the number of the sample."""
    return str(((completion.token_ids[0] - token(PROMPT, 0, 0)) // 10 - FIRST_SEED) % SAMPLES)


class NoWeights:
    """A `WeightSync` of an engine without weights."""

    def push(self, version: int) -> None:
        """Do nothing."""

    def restore(self, version: int) -> None:
        """Do nothing."""


@contextmanager
def stage(name: str) -> Iterator[Progress]:
    yield lambda done, total: None


@pytest.fixture
def reward_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardManager]:
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    reward_manager = RewardManager({domain: RewardConfig(worker_cls="my_rewards.scores") for domain in GROUPS})
    yield reward_manager
    reward_manager.close()


def collector(
    reward_manager: RewardManager, filters: dict[str, QueryFilterSettings], num_prompts: int, max_rounds: int = 1
) -> Collector:
    prompts = [
        Prompt(PROMPT, name, {"id": name, "domain": domain, "tag": "", "ground_truth": "", "of": scores})
        for domain, groups in GROUPS.items()
        for name, scores in groups.items()
    ]
    engine = CountingEngine()
    generator = Generator(engine, pad_token_id=0, seed=0, stream=LocalStream(engine))
    settings = StreamSettings(
        sampling=Sampling(num_samples=SAMPLES, max_new_tokens=2),
        groups_per_step=num_prompts,
        num_steps=10,
        query_filters=filters,
        max_rounds=max_rounds,
    )
    stream = RolloutStream(PromptSampler(prompts, seed=0), generator, reward_manager, text_of, settings)
    return Collector(stream, generator, reward_manager, text_of, NoWeights())


def names(prompts: Sequence[Prompt]) -> set[tuple[str, str]]:
    return {(prompt.row["domain"], prompt.text) for prompt in prompts}


def test_each_domain_drops_by_its_own_filter_and_failures_count_in_none(reward_manager: RewardManager) -> None:
    filters = {"strict": QueryFilterSettings("mean_filter", threshold_down=0.0, threshold_up=1.5)}
    collected = collector(reward_manager, filters, num_prompts=6).collect(1, stage)
    metrics = collected.metrics
    assert metrics["domain/strict/groups_dropped"] == 1, "one sample is no group; the others have a mean of 2/3 or 1"
    assert metrics["domain/open/groups_dropped"] == 0, "without a filter even a group without a score stays"
    assert collected.rollouts.prompts[-1].text == "one left", "a dropped group fills the batch last"
    assert metrics["reward/failed"] == 6 == (~collected.valid).sum()
    assert metrics["rollout/score_mean"] == pytest.approx((3 + 2 + 2 + 2 + 3) / 12)
    assert (metrics["domain/strict/failed"], metrics["domain/open/failed"]) == (3, 3)
    assert metrics["domain/open/score_mean"] == 1 and metrics["domain/strict/num_samples"] == 12
    assert metrics["reward/component/part"] == pytest.approx(0.5)
    assert metrics["domain/strict/response_length_mean"] == 2


def test_failed_samples_lend_a_group_no_spread(reward_manager: RewardManager) -> None:
    filters = dict.fromkeys(GROUPS, QueryFilterSettings("std_filter"))
    collected = collector(reward_manager, filters, num_prompts=6).collect(1, stage)
    assert collected.rollouts.prompts[0].text == "different", "the only group that teaches"
    assert collected.metrics["sampling/groups_dropped"] == 5
    assert collected.metrics["domain/strict/groups_dropped"] == 3


def test_without_a_filter_all_groups_are_kept_in_order(reward_manager: RewardManager) -> None:
    collected = collector(reward_manager, {}, num_prompts=6).collect(1, stage)
    assert names(collected.rollouts.prompts) == {(d, name) for d, groups in GROUPS.items() for name in groups}
    for index, (prompt, result) in enumerate(zip(collected.rollouts.prompts, collected.results, strict=True)):
        score = prompt.row["of"][index % 3]
        assert (result.failed is not None) if score is None else result.score == score
    assert "sampling/prompts" not in collected.metrics and "domain/open/groups_dropped" not in collected.metrics
