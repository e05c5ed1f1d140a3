from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roll_gspo.algorithms.advantage import AdvantageSettings
from roll_gspo.algorithms.kl import AdaptiveKLController, KLController
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.algorithms.sample_weighting import SampleMaskSettings
from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.pipelines.collect import Collected
from roll_gspo.pipelines.experience import ExperienceSettings, TokenScoring, mismatch, rollout_metrics, train_batch
from roll_gspo.pipelines.state import TrainerState
from roll_gspo.rewards.base import RewardResult

PROMPTS = [Prompt((1, 2), "a", {"difficulty": "0.5"}), Prompt((3,), "b", {"difficulty": 0})]
NO_MASKS = SampleMaskSettings(
    max_len_mask=False, difficulty_mask=False, difficulty_low_threshold=0.0, difficulty_high_threshold=1.0
)
GRPO = ExperienceSettings(AdvantageSettings(adv_estimator="grpo"), NO_MASKS, response_length=4)


def rollouts() -> Rollouts:
    """Two groups of two; responses of 2, 1, 3 and 1 tokens, one of them cut off."""
    lengths = [[2, 1], [3, 1]]
    groups = [[Completion((7,) * n, (-0.5,) * n, "length" if n == 3 else "stop") for n in group] for group in lengths]
    return Rollouts.collate(PROMPTS, groups, pad=0, weights_version=4)


def collected(*scores: float) -> Collected:
    return Collected(rollouts(), tuple(RewardResult(score) for score in scores), {})


def state(controller: KLController | None = None) -> TrainerState:
    return TrainerState(0, PromptSampler(PROMPTS, seed=0), RunningMoments(), controller)


def scoring(**others: torch.Tensor) -> TokenScoring:
    return TokenScoring(rollouts().rollout_log_probs, **others)


def test_reward_of_a_sample_becomes_its_advantage() -> None:
    batch, metrics = train_batch(collected(1.0, 0.0, 3.0, 1.0), scoring(), GRPO, state())
    signs = batch.advantages.sign().tolist()
    assert signs == [[1.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]
    assert batch.sample_ids.tolist() == [0, 1, 2, 3] and batch.ref_log_probs is None
    assert batch.sample_weights is None and batch.returns is None
    assert metrics["reward/score_mean"] == 1.25 and "kl/coef" not in metrics
    assert metrics["actor/masked_fraction"] == 0


def test_token_level_kl_lowers_rewards_and_is_told_to_the_controller() -> None:
    controller = AdaptiveKLController(init_kl_coef=0.5, target_kl=0.01, kl_horizon=8)
    mask = rollouts().sequences.response_mask
    old = torch.where(mask, -0.5, 0.0)
    with_kl = AdvantageSettings(adv_estimator="reinforce", add_token_level_kl=True, kl_penalty="kl")
    settings = replace(GRPO, advantages=with_kl)
    tokens = TokenScoring(old, ref_log_probs=old - mask * 0.2)
    batch, metrics = train_batch(collected(1.0, 1.0, 1.0, 1.0), tokens, settings, state(controller))
    # 0.2 nats a token, times 0.5, taken from the reward to go: 1 - 0.1 for each token that is left
    assert batch.advantages[2].tolist() == pytest.approx([0.7, 0.8, 0.9])
    assert metrics["kl/coef"] == 0.5 and metrics["reward/kl"] == pytest.approx(0.2)
    assert controller.kl_coef == pytest.approx(0.5 * (1 + 0.2 * 4 / 8)), "far above its target: as fast as it may"


def test_cut_off_sample_is_masked_out_of_the_loss_but_counts_in_its_group() -> None:
    masks = replace(NO_MASKS, max_len_mask=True)
    plain, _ = train_batch(collected(1.0, 0.0, 3.0, 1.0), scoring(), GRPO, state())
    batch, metrics = train_batch(collected(1.0, 0.0, 3.0, 1.0), scoring(), replace(GRPO, masks=masks), state())
    assert batch.response_mask.sum(-1).tolist() == [2, 1, 0, 1]
    assert batch.sequences.lengths.tolist() == [4, 3, 1, 2], "its response is not even computed"
    assert torch.equal(batch.advantages[[0, 1, 3]], plain.advantages[[0, 1, 3]])
    assert metrics["actor/masked_fraction"] == 0.25


def test_difficulty_mask_leaves_groups_out_by_their_mean_score() -> None:
    masks = replace(NO_MASKS, difficulty_mask=True, difficulty_low_threshold=0.1, difficulty_high_threshold=0.9)
    batch, metrics = train_batch(collected(1.0, 0.0, 1.0, 1.0), scoring(), replace(GRPO, masks=masks), state())
    assert batch.response_mask.any(-1).tolist() == [True, True, False, False]
    assert metrics["actor/masked_fraction"] == 0.5


def test_sample_weights_have_mean_one_over_the_samples_of_the_loss() -> None:
    masks = replace(NO_MASKS, max_len_mask=True)
    settings = replace(GRPO, masks=masks, length_loss_weight=True, difficulty_loss_weight=True)
    batch, metrics = train_batch(collected(1.0, 0.0, 3.0, 1.0), scoring(), settings, state())
    # lengths 2, 1, 1 of the kept: 0.5, 1.5, 1.5; difficulty 0.5, 0.5, 0: 1.25, 1.25, 0.5
    raw = torch.tensor([0.5 * 1.25, 1.5 * 1.25, 1.5 * 0.5])
    assert batch.sample_weights is not None
    torch.testing.assert_close(batch.sample_weights[[0, 1, 3]], raw / raw.mean())
    assert metrics["actor/sample_weight_max"] == pytest.approx(float((raw / raw.mean()).max()))


def test_overlong_penalty_shapes_the_score_and_not_the_difficulty() -> None:
    settings = replace(GRPO, overlong_buffer_length=2, overlong_penalty_factor=0.5)
    batch, metrics = train_batch(collected(1.0, 1.0, 1.0, 1.0), scoring(), settings, state())
    # 3 of at most 4 tokens with a buffer of 2: half of the penalty
    assert metrics["reward/overlong_penalty"] == pytest.approx(-0.25 / 4)
    assert (batch.advantages[2] < 0).all() and batch.advantages[3, 0] > 0
    assert batch.advantages[:2].eq(0).all()


def test_critic_gets_returns_and_says_what_it_explains() -> None:
    mask = rollouts().sequences.response_mask
    values = torch.where(mask, 0.5, 0.0)
    settings = replace(GRPO, advantages=AdvantageSettings(adv_estimator="gae", gamma=1.0, lambd=1.0))
    batch, metrics = train_batch(collected(1.0, 0.0, 1.0, 0.0), scoring(values=values), settings, state())
    assert batch.returns is not None
    assert batch.returns[mask].tolist() == pytest.approx([1, 1, 0, 1, 1, 1, 0])
    assert batch.advantages[mask].tolist() == pytest.approx([0.5, 0.5, -0.5, 0.5, 0.5, 0.5, -0.5])
    assert metrics["critic/explained_variance"] == pytest.approx(0.0)


def test_mismatch_is_that_of_the_response_tokens() -> None:
    rolled = rollouts()
    off = torch.where(rolled.sequences.response_mask, rolled.rollout_log_probs + 0.1, 99.0)
    found = mismatch(rolled, off)
    assert found["mismatch/log_prob_diff_mean"] == pytest.approx(0.1)
    assert found["mismatch/log_prob_diff_max"] == pytest.approx(0.1)


def test_rollout_metrics_count_lengths_and_cuts() -> None:
    assert rollout_metrics(rollouts()) == {
        "rollout/response_length_mean": 7 / 4,
        "rollout/response_length_max": 3.0,
        "rollout/response_length_min": 1.0,
        "rollout/prompt_length_mean": 1.5,
        "rollout/truncated_fraction": 0.25,
        "rollout/weights_version": 4.0,
    }
