"""The turns of episodes in a rollout, and what has to skip the tokens that an episode was given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roll_gspo.algorithms.advantage_estimators import AdvantageSettings
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.algorithms.sample_weighting import SampleMaskSettings
from roll_gspo.batch import Completion, Prompt, Rollouts, TrainBatch
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.episode import Episode, EpisodeBranch, EpisodeTurn
from roll_gspo.pipelines.rlvr.collect import Collected
from roll_gspo.pipelines.rlvr.credit import turns_of
from roll_gspo.pipelines.rlvr.experience import ExperienceSettings, TokenScoring, rollout_metrics, train_batch
from roll_gspo.pipelines.rlvr.sample_records import sample_batch
from roll_gspo.pipelines.rlvr.state import RlvrState
from roll_gspo.rewards.base import RewardResult
from roll_gspo.roles.mini_batches import MiniBatches
from roll_gspo.tracking.token_texts import TokenTexts

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
    turns = turns_of(COMPLETIONS, torch.tensor(SCORES))
    assert turns.rewards.tolist() == [1.0, 2.0, 0.0, 4.0, -2.0, 1.0, 0.5]
    assert turns.samples.tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert turns.numbers.tolist() == [0, 1, 0, 1, 2, 0, 0]
    assert turns.states.tolist() == [0, 1, 0, 2, 2, 3, 0], "the prompt, 'ok', the prompt, 'no', 'no', none, the prompt"
    of_tokens = [
        row[: completion.num_sampled].tolist() for row, completion in zip(turns.of_tokens, COMPLETIONS, strict=True)
    ]
    assert of_tokens == [[0, 0, 1], [2, 3, 4, 4], [5, 5], [6, 6, 6]]


def test_what_a_score_has_beyond_its_turns_belongs_to_the_last_one() -> None:
    turns = turns_of(COMPLETIONS, torch.tensor([2.5, 2.0, 0.1, 0.7]))
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


def cut(completion: Completion, turn: int) -> Completion:
    """Return the same episode with its first `turn` turns in another conversation, which the last one continues."""
    episode = completion.episode
    assert episode is not None
    end, start = episode.turn_ends[turn - 1], episode.mask.index(True, episode.turn_ends[turn - 1])
    first = EpisodeBranch(
        *(episode.prompt_ids, completion.token_ids[:end], completion.log_probs[:end], episode.mask[:end]),
        *(episode.turn_ends[:turn], tuple(replace(each, reward=0.0) for each in episode.turns[:turn])),
    )
    rest = replace(
        episode,
        prompt_ids=(*episode.prompt_ids, *completion.token_ids[:start]),
        mask=episode.mask[start:],
        turn_ends=tuple(each - start for each in episode.turn_ends[turn:]),
        turns=episode.turns[turn:],
        branches=(first,),
    )
    return Completion(
        completion.token_ids[start:], completion.log_probs[start:], completion.finish_reason, episode=rest
    )


LAST_TURN = [  # rewards of the last turn only, so that a cut loses none
    episode((0, 2, 0.0), (1, 1, 2.0)),
    episode((0, 1, 0.0), (2, 1, 0.0), (1, 2, -1.0), text="no"),
    Completion((5, 6), (-0.5, -0.5), "stop"),
    episode((0, 3, 0.5)),
]
CUT = [LAST_TURN[0], cut(LAST_TURN[1], 1), *LAST_TURN[2:]]


def batch_of(completions: list[Completion], settings: AdvantageSettings, failed: tuple[int, ...] = ()) -> TrainBatch:
    rollouts = Rollouts.collate([PROMPT], [completions], pad=0, weights_version=3)
    scores = [
        RewardResult(0.0, "lost") if i in failed else RewardResult(s) for i, s in enumerate((2.0, -1.0, 1.0, 0.5))
    ]
    state = RlvrState(0, PromptSampler([PROMPT], seed=0), RunningMoments(), None)
    # values of the tokens in order, which do not depend on the rows
    values = torch.zeros(rollouts.sequences.response_mask.shape)
    for sample in range(len(completions)):
        rows = (rollouts.samples == sample).nonzero().flatten().flip(0)  # the own conversation is the first row
        count = 0
        for row in rows.tolist():
            mask = rollouts.sequences.response_mask[row]
            values[row, mask] = 0.25 * torch.arange(count, count + int(mask.sum()))
            count += int(mask.sum())
    scoring = TokenScoring(rollouts.rollout_log_probs, values=values)
    experience = ExperienceSettings(settings, SampleMaskSettings(), response_length=10)
    return train_batch(Collected(rollouts, tuple(scores), {}), scoring, experience, state)[0]


def test_conversations_of_an_episode_are_rows_of_one_sample() -> None:
    rollouts = Rollouts.collate([PROMPT], [CUT], pad=0, weights_version=3)
    assert len(rollouts) == 4 and rollouts.samples.tolist() == [0, 1, 2, 3, 1]
    assert rollouts.group_ids.tolist() == [0] * 4 and len(rollouts.own) == 4
    assert rollouts.sequences.response_mask.sum(-1).tolist() == [3, 3, 2, 3, 1]
    assert rollouts.rollout_log_probs[4].tolist() == [-0.5, 0, 0, 0] and rollouts.versions.unique().tolist() == [3]
    whole = Rollouts.collate([PROMPT], [LAST_TURN], pad=0, weights_version=3)
    assert rollout_metrics(rollouts)["rollout/response_length_mean"] == 3.0
    assert rollout_metrics(whole)["rollout/response_length_mean"] == 3.0


@pytest.mark.parametrize(
    "settings",
    [
        AdvantageSettings("grpo"),
        AdvantageSettings("reinforce_plus_plus", gamma=0.9),
        AdvantageSettings("opo", step_reward_gamma=0.5),
        AdvantageSettings("grpo", credit="turn", step_reward_gamma=0.5, episode_reward_weight=1.0),
        AdvantageSettings("gae", gamma=0.9, lambd=0.5),
        AdvantageSettings("gae", gamma=0.9, lambd=0.5, credit="turn"),
    ],
    ids=lambda settings: f"{settings.adv_estimator}-{settings.credit}",
)
def test_rows_of_an_episode_have_the_advantages_of_one_row(settings: AdvantageSettings) -> None:
    whole, rows = batch_of(LAST_TURN, settings), batch_of(CUT, settings)
    for name in ("advantages", "returns"):
        expected, found = whole.__dict__[name], rows.__dict__[name]
        assert (expected is None) == (found is None)
        if expected is not None:
            for sample in (0, 2, 3):
                in_whole, in_rows = whole.response_mask[sample], rows.response_mask[sample]
                torch.testing.assert_close(found[sample][in_rows], expected[sample][in_whole])
            joined = torch.cat([found[4][rows.response_mask[4]], found[1][rows.response_mask[1]]])
            torch.testing.assert_close(joined, expected[1][whole.response_mask[1]])


def test_a_failed_episode_is_masked_in_all_rows() -> None:
    batch = batch_of(CUT, AdvantageSettings("grpo"), failed=(1,))
    assert batch.response_mask.any(-1).tolist() == [True, False, True, True, False]
    assert not batch.advantages[[1, 4]].any()


def test_mini_batches_have_as_many_samples_as_ever_with_all_their_rows() -> None:
    def samples_of(batch: TrainBatch) -> list[list[int]]:
        mini_batches = MiniBatches("x", mini_batch_size=2, num_epochs=2, max_consecutive_skipped_steps=1, seed=1)
        return [batch.sample_ids[index].tolist() for index in mini_batches.indices(batch, step=3)]

    whole, rows = (samples_of(batch_of(completions, AdvantageSettings("grpo"))) for completions in (LAST_TURN, CUT))
    assert len(whole) == len(rows) == 4, "two optimizer steps per epoch"
    assert [set(samples) for samples in rows] == [set(samples) for samples in whole]
    assert all(samples.count(1) == 2 for samples in rows if 1 in samples)


def test_files_have_one_line_per_sample() -> None:
    rollouts = Rollouts.collate([PROMPT], [CUT], pad=0, weights_version=3)
    batch = batch_of(CUT, AdvantageSettings("grpo"))
    results = [RewardResult(1.0)] * 4
    texts = TokenTexts(lambda tokens: " ".join(map(str, tokens)))
    written = sample_batch(rollouts, ["a"] * 4, results, texts, [0], batch, version=3)
    assert all(len(column) == 4 for column in written.columns.values())
    assert written.columns["response_length"] == [3, 3, 2, 3]
