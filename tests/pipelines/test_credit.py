"""The turns of episodes in a rollout, and what has to skip the tokens that an episode was given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roll_gspo.algorithms.advantage_estimators import AdvantageSettings
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.algorithms.sample_weighting import SampleMaskSettings
from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.episode import Episode, EpisodeTurn
from roll_gspo.pipelines.rlvr.collect import Collected
from roll_gspo.pipelines.rlvr.credit import turns_of
from roll_gspo.pipelines.rlvr.experience import ExperienceSettings, TokenScoring, rollout_metrics, train_batch
from roll_gspo.pipelines.rlvr.state import RlvrState
from roll_gspo.rewards.base import RewardResult

PROMPT = Prompt((1, 2), "a", {})


def episode(*turns: tuple[int, int, float], text: str = "ok", trailing: int = 0) -> Completion:
    """Return an episode of (given tokens, sampled tokens, reward); the first turn has no given tokens."""
    mask: list[bool] = []
    ends = []
    for given, sampled, _ in turns:
        mask += [False] * given + [True] * sampled
        ends.append(len(mask))
    mask += [False] * trailing
    played = tuple(EpisodeTurn("x", ({"role": "user", "content": text},), reward) for _, _, reward in turns)
    record = Episode(PROMPT.token_ids, tuple(mask), tuple(ends), played, "done")
    log_probs = tuple(-0.5 if sampled else 0.0 for sampled in mask)
    return Completion((7,) * len(mask), log_probs, "stop", episode=record)


COMPLETIONS = [
    episode((0, 2, 1.0), (1, 1, 2.0)),
    episode((0, 1, 0.0), (2, 1, 4.0), (1, 2, -2.0), text="no", trailing=1),
    Completion((5, 6), (-0.5, -0.5), "stop"),
    episode((0, 3, 0.5)),
]
SCORES = [3.0, 2.0, 1.0, 0.5]


def collected(failed: tuple[int, ...] = ()) -> Collected:
    rollouts = Rollouts.collate([PROMPT], [COMPLETIONS], pad=0, weights_version=0)
    results = [RewardResult(0.0, "lost") if i in failed else RewardResult(score) for i, score in enumerate(SCORES)]
    return Collected(rollouts, tuple(results), {})


def trained(settings: AdvantageSettings, failed: tuple[int, ...] = (), **others: object) -> torch.Tensor:
    experience = replace(ExperienceSettings(settings, SampleMaskSettings(), response_length=10), **others)  # type: ignore[arg-type]
    rolled = collected(failed)
    state = RlvrState(0, PromptSampler([PROMPT], seed=0), RunningMoments(), None)
    batch, _ = train_batch(rolled, TokenScoring(rolled.rollouts.rollout_log_probs), experience, state)
    return batch.advantages


def test_turns_of_episodes_and_single_responses() -> None:
    turns = turns_of(COMPLETIONS, torch.tensor(SCORES), width=8)
    assert turns.rewards.tolist() == [1.0, 2.0, 0.0, 4.0, -2.0, 1.0, 0.5]
    assert turns.samples.tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert turns.numbers.tolist() == [0, 1, 0, 1, 2, 0, 0]
    assert turns.states.tolist() == [0, 1, 0, 2, 2, 0, 0], "after nothing, 'ok', nothing, 'no', 'no', nothing, nothing"
    mask = collected().rollouts.sequences.response_mask
    of_tokens = [row[inside].tolist() for row, inside in zip(turns.of_tokens, mask, strict=True)]
    assert of_tokens == [[0, 0, 1], [2, 3, 4, 4], [5, 5], [6, 6, 6]]


def test_format_penalty_belongs_to_the_invalid_turn() -> None:
    completion = COMPLETIONS[1]
    assert completion.episode is not None
    turns = tuple(replace(turn, invalid=number == 1) for number, turn in enumerate(completion.episode.turns))
    invalid = replace(completion, episode=replace(completion.episode, turns=turns))
    found = turns_of([invalid, invalid], torch.tensor([1.5, 1.0]), width=8, format_penalty=-0.5)
    assert found.rewards.tolist() == [0.0, 3.5, -2.0, 0.0, 3.5, -2.5]


def test_what_a_score_has_beyond_its_turns_belongs_to_the_last_one() -> None:
    turns = turns_of(COMPLETIONS, torch.tensor([2.5, 2.0, 0.1, 0.7]), width=8)
    assert turns.rewards.tolist() == pytest.approx([1.0, 1.5, 0.0, 4.0, -2.0, 0.1, 0.7])
    assert float(turns.rewards[-1]) == float(torch.tensor(0.7)), "one turn has the score itself"


def test_a_step_trains_each_turn_on_its_return() -> None:
    advantages = trained(AdvantageSettings("reinforce", credit="turn"))
    assert advantages[0, :4].tolist() == [3.0, 3.0, 0.0, 2.0]
    assert advantages[1, :7].tolist() == [2.0, 0.0, 0.0, 2.0, 0.0, -2.0, -2.0]
    assert advantages[2, :2].tolist() == [1.0, 1.0] and advantages[3, :3].tolist() == [0.5] * 3


def test_failed_episodes_are_compared_with_nothing() -> None:
    settings = AdvantageSettings("dr_grpo", credit="turn")
    advantages = trained(settings, failed=(0,))
    assert not advantages[0].any()
    # second turns: only the one of episode 1 is left; first turns: returns 2, 1, 0.5
    assert advantages[1, 3] == 0 and advantages[1, 0] == pytest.approx(2 - 3.5 / 3)


def test_an_episode_of_one_turn_is_a_response() -> None:
    settings = AdvantageSettings("grpo")
    for credit, gamma in (("episode", 1.0), ("episode", 0.5), ("turn", 0.5)):
        alone = Rollouts.collate([PROMPT], [[COMPLETIONS[2], COMPLETIONS[3]]], pad=0, weights_version=0)
        rolled = Collected(alone, (RewardResult(1.0), RewardResult(0.5)), {})
        state = RlvrState(0, PromptSampler([PROMPT], seed=0), RunningMoments(), None)
        experience = ExperienceSettings(
            replace(settings, credit=credit, step_reward_gamma=gamma), SampleMaskSettings(), response_length=10
        )
        batch, _ = train_batch(rolled, TokenScoring(alone.rollout_log_probs), experience, state)
        plain = replace(experience, advantages=settings)
        expected, _ = train_batch(rolled, TokenScoring(alone.rollout_log_probs), plain, state)
        assert torch.equal(batch.advantages, expected.advantages)


def test_length_limit_counts_given_tokens_and_metrics_do_not() -> None:
    # 7 positions of at most 10 up to the last sampled token, of which 4 were sampled: one token inside the buffer of 4
    penalised = trained(AdvantageSettings("reinforce"), overlong_buffer_length=4, overlong_penalty_factor=2.0)
    assert penalised[:, 0].tolist() == pytest.approx([3.0, 2.0 - 0.5, 1.0, 0.5])
    assert [completion.num_sampled for completion in COMPLETIONS] == [3, 4, 2, 3]
    assert rollout_metrics(collected().rollouts)["rollout/response_length_mean"] == 3.0
