from __future__ import annotations

import pytest
import torch

from roll_gspo.algorithms.advantage import AdvantageSettings
from roll_gspo.algorithms.kl import AdaptiveKLController
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.pipelines.experience import mismatch, rollout_metrics, train_batch
from roll_gspo.rewards.base import RewardResult


def rollouts() -> Rollouts:
    """Two groups of two; responses of 2, 1, 3 and 1 tokens, one of them cut off."""
    lengths = [[2, 1], [3, 1]]
    groups = [[Completion((7,) * n, (-0.5,) * n, "length" if n == 3 else "stop") for n in group] for group in lengths]
    return Rollouts.collate([Prompt((1, 2), "a", {}), Prompt((3,), "b", {})], groups, pad=0, weights_version=4)


def test_reward_of_a_sample_becomes_its_advantage() -> None:
    batch, metrics = train_batch(
        rollouts(),
        torch.tensor([1.0, 0.0, 3.0, 1.0]),
        rollouts().rollout_log_probs,
        None,
        AdvantageSettings(adv_estimator="grpo"),
        None,
        RunningMoments(),
    )
    signs = batch.advantages.sign().tolist()
    assert signs == [[1.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]
    assert batch.sample_ids.tolist() == [0, 1, 2, 3] and batch.ref_log_probs is None
    assert metrics["reward/score_mean"] == 1.25 and "kl/coef" not in metrics


def test_token_level_kl_lowers_rewards_and_is_told_to_the_controller() -> None:
    controller = AdaptiveKLController(init_kl_coef=0.5, target_kl=0.01, kl_horizon=8)
    rolled = rollouts()
    mask = rolled.sequences.response_mask
    old = torch.where(mask, -0.5, 0.0)
    settings = AdvantageSettings(adv_estimator="reinforce", add_token_level_kl=True, kl_penalty="kl")
    scores = torch.ones(4)
    batch, metrics = train_batch(rolled, scores, old, old - mask * 0.2, settings, controller, RunningMoments())
    # 0.2 nats a token, times 0.5, taken from the reward to go: 1 - 0.1 for each token that is left
    assert batch.advantages[2].tolist() == pytest.approx([0.7, 0.8, 0.9])
    assert metrics["kl/coef"] == 0.5 and metrics["reward/kl"] == pytest.approx(0.2)
    assert controller.kl_coef == pytest.approx(0.5 * (1 + 0.2 * 4 / 8)), "far above its target: as fast as it may"


def test_mismatch_is_that_of_the_response_tokens() -> None:
    rolled = rollouts()
    off = torch.where(rolled.sequences.response_mask, rolled.rollout_log_probs + 0.1, 99.0)
    found = mismatch(rolled, off)
    assert found["mismatch/log_prob_diff_mean"] == pytest.approx(0.1)
    assert found["mismatch/log_prob_diff_max"] == pytest.approx(0.1)


def test_rollout_metrics_count_lengths_cuts_and_failures() -> None:
    results = [RewardResult(1.0), RewardResult(0.0, "raised"), RewardResult(1.0), RewardResult(0.0, "hung")]
    metrics = rollout_metrics(rollouts(), results)
    assert metrics == {
        "rollout/response_length_mean": 7 / 4,
        "rollout/response_length_max": 3.0,
        "rollout/response_length_min": 1.0,
        "rollout/prompt_length_mean": 1.5,
        "rollout/truncated_fraction": 0.25,
        "rollout/num_tokens": 7.0,
        "rollout/weights_version": 4.0,
        "reward/failed": 2.0,
    }
