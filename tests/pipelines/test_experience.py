from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from roll_gspo.algorithms.advantage_estimators import AdvantageSettings
from roll_gspo.algorithms.kl import AdaptiveKLController, KLController
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.algorithms.sample_weighting import SampleMaskSettings
from roll_gspo.batch import Completion, Prompt, Rollouts, TrainBatch
from roll_gspo.data.sampler import PromptSampler
from roll_gspo.pipelines.rlvr.collect import Collected
from roll_gspo.pipelines.rlvr.experience import (
    ExperienceSettings,
    TokenScoring,
    mismatch,
    rollout_metrics,
    staleness,
    train_batch,
)
from roll_gspo.pipelines.rlvr.state import RlvrState
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


def state(controller: KLController | None = None) -> RlvrState:
    return RlvrState(0, PromptSampler(PROMPTS, seed=0), RunningMoments(), controller)


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
    # 0.2 nats per token, times 0.5, subtracted from the reward-to-go: 1 - 0.1 per remaining token
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


MANY = [Prompt((1, 2), "a", {}), Prompt((3,), "b", {}), Prompt((4, 5), "c", {})]
ESTIMATORS = {
    "grpo": AdvantageSettings("grpo"),
    "grpo of the batch": AdvantageSettings("grpo", reward_norm="batch", reward_clip=1.5),
    "running": AdvantageSettings("reinforce", gamma=0.9, reward_norm="running"),
    "reinforce++": AdvantageSettings("reinforce_plus_plus", add_token_level_kl=True),
    "reinforce++ baseline": AdvantageSettings("reinforce_plus_plus_baseline", advantage_clip=0.5),
    "rloo": AdvantageSettings("rloo", whiten_advantages=True),
    "opo": AdvantageSettings("opo"),
    "raft++": AdvantageSettings("raft_plus_plus"),
    "maxrl": AdvantageSettings("maxrl"),
    "gdpo": AdvantageSettings("gdpo"),
    "gae": AdvantageSettings("gae", gamma=0.9),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_failed_samples_are_as_if_they_had_never_been(name: str) -> None:
    """Three groups of three with two failures, against the seven samples alone: the same numbers, bit for bit."""
    failed = {1, 8}  # which are not the longest, so that both batches are equally wide
    lengths, scores = [2, 1, 3, 1, 3, 2, 2, 3, 1], [1.0, 9.0, 0.0, 0.5, 2.0, 1.0, 0.0, 1.0, -9.0]
    settings = replace(
        GRPO,
        advantages=ESTIMATORS[name],
        masks=replace(NO_MASKS, max_len_mask=True, difficulty_mask=True),
        length_loss_weight=True,
        overlong_buffer_length=2,
    )

    def trained(without: bool) -> tuple[TrainBatch, dict[str, float], RlvrState]:
        numbers = [i for i in range(9) if not without or i not in failed]
        groups = [
            [Completion((7,) * lengths[i], (-0.5,) * lengths[i], "stop") for i in numbers if i // 3 == group]
            for group in range(3)
        ]
        rolled = Rollouts.collate(MANY, groups, pad=0, weights_version=0)
        results = [RewardResult(0.0, "died") if i in failed else RewardResult(scores[i]) for i in numbers]
        whole = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))[numbers]
        old = torch.where(rolled.sequences.response_mask, whole, 0.0)
        values = torch.where(rolled.sequences.response_mask, whole.sin(), 0.0)
        tokens = TokenScoring(old, ref_log_probs=old * 0.9, values=values)
        kept_state = state(AdaptiveKLController(init_kl_coef=0.5, target_kl=0.01, kl_horizon=8))
        if not ESTIMATORS[name].add_token_level_kl:
            kept_state = state()
        return *train_batch(Collected(rolled, tuple(results), {}), tokens, settings, kept_state), kept_state

    batch, metrics, after = trained(without=False)
    expected, expected_metrics, expected_after = trained(without=True)
    present = torch.tensor([i for i in range(9) if i not in failed])
    absent = torch.tensor(sorted(failed))
    assert torch.equal(batch.advantages[present], expected.advantages) and bool(expected.advantages.any())
    assert torch.equal(batch.response_mask[present], expected.response_mask)
    assert batch.sample_weights is not None and expected.sample_weights is not None
    assert torch.equal(batch.sample_weights[present], expected.sample_weights)
    assert not batch.advantages[absent].any() and not batch.response_mask[absent].any()
    if batch.returns is not None and expected.returns is not None:
        assert torch.equal(batch.returns[present], expected.returns) and not batch.returns[absent].any()
    assert metrics.pop("actor/masked_fraction") > expected_metrics.pop("actor/masked_fraction")
    assert metrics == expected_metrics
    assert after.running_moments.state_dict() == expected_after.running_moments.state_dict()
    if after.kl_controller is not None and expected_after.kl_controller is not None:
        assert after.kl_controller.state_dict() == expected_after.kl_controller.state_dict()


def test_gdpo_normalises_the_parts_of_each_domain() -> None:
    """One domain has a weighted sum of two parts, the other a single score; both are overlong in part."""
    results = (
        RewardResult(1.5, components={"answer": 1.0, "format": 1.0, "answer/steps": 9.0}),
        RewardResult(1.0, components={"answer": 1.0, "format": 0.0}),
        RewardResult(40.0, components={"answer": -7.0}),
        RewardResult(60.0),
    )
    settings = replace(
        GRPO,
        advantages=AdvantageSettings("gdpo"),
        part_weights={"sums": {"answer": 1.0, "format": 0.5}},
        overlong_buffer_length=2,
        overlong_penalty_factor=4.0,
    )
    rewarded = Collected(rollouts(), results, {})
    batch, _ = train_batch(rewarded, scoring(), settings, state(), ("sums", "sums", "other", "other"))
    # Group 0: answers equal, formats +-0.7071 of weight 0.5. Group 1: scores -+0.7071, and a penalty of 2.
    halves = [0.25 * 2**0.5, -0.25 * 2**0.5, -(2**0.5), 2**0.5]
    std = (sum(x * x for x in halves) / 3) ** 0.5
    assert batch.advantages[:, 0].tolist() == pytest.approx([x / std for x in halves], rel=1e-5)


def test_policy_loss_sees_the_tokens_of_highest_entropy_of_the_whole_rollout() -> None:
    entropy = torch.tensor([[0.9, 0.1, 9.0], [0.8, 9.0, 9.0], [0.2, 0.3, 0.7], [0.4, 9.0, 9.0]])
    scores = collected(1.0, 0.0, 3.0, 1.0)
    batch, _ = train_batch(scores, scoring(entropy=entropy), replace(GRPO, top_entropy_quantile=0.4), state())
    assert batch.policy_mask is not None
    assert batch.policy_mask.tolist() == [
        [True, False, False],
        [True, False, False],
        [False, False, True],
        [False, False, False],
    ]
    assert torch.equal(batch.response_mask, rollouts().sequences.response_mask), "ratio and KL see every token"
    part = batch.rows(torch.tensor([2, 1]))
    assert part.policy_mask is not None and part.policy_mask.tolist() == [[False, False, True], [True, False, False]]
    assert train_batch(scores, scoring(entropy=entropy), GRPO, state())[0].policy_mask is None


def test_length_quartiles_are_those_of_the_rollout_and_stay_with_their_samples() -> None:
    batch, _ = train_batch(collected(1.0, 0.0, 3.0, 1.0), scoring(), GRPO, state())
    assert batch.length_quartiles is not None and batch.length_quartiles.tolist() == [2, 0, 3, 0]
    part = batch.rows(torch.tensor([2, 1]))
    assert part.length_quartiles is not None and part.length_quartiles.tolist() == [3, 0]


def stale_rollouts() -> Rollouts:
    """Return samples of weights 4, except that weights 1 began the longest."""
    whole = rollouts()
    longest = replace(whole.completions[2], version_runs=((1, 2), (4, 1)))
    first, second = whole.completions[:2], (longest, whole.completions[3])
    return Rollouts.collate(PROMPTS, [first, second], pad=0, weights_version=4)


def test_staleness_of_each_token_is_counted_and_stays_with_its_sample() -> None:
    rolled = stale_rollouts()
    buckets, metrics = staleness(rolled, version=4)
    assert buckets is not None and metrics["staleness/max"] == 3 and metrics["staleness/share_3"] == 2 / 7
    assert metrics["staleness/mean"] == 6 / 7 and metrics["staleness/sample_max_mean"] == 3 / 4
    batch, _ = train_batch(collected(1.0, 0.0, 3.0, 1.0), scoring(lag_buckets=buckets), GRPO, state())
    part = batch.rows(torch.tensor([2, 1]))
    assert part.lag_buckets is not None and part.lag_buckets[0].tolist() == [3, 3, 0]
    found = mismatch(rolled, rolled.rollout_log_probs + 0.1, buckets)
    assert found["staleness/log_prob_diff_mean_lag_3_4"] == pytest.approx(0.1)
    assert found["mismatch/ess"] == pytest.approx(found["staleness/ess_lag_0"])


def test_synchronous_rollout_has_no_metrics_of_staleness() -> None:
    assert staleness(rollouts(), version=4) == (None, {})
    assert not [name for name in mismatch(rollouts(), rollouts().rollout_log_probs) if "staleness" in name]
    _, metrics = staleness(rollouts(), version=4, max_lag=2)
    shares = [metrics[f"staleness/share_{lag}"] for lag in range(3)]
    assert shares == [1.0, 0.0, 0.0], "a run that allows staleness always logs the same names"


def with_failures(*scores: float | None) -> Collected:
    results = [RewardResult(0.0, "hung") if score is None else RewardResult(score) for score in scores]
    return Collected(rollouts(), tuple(results), {})


def test_sample_whose_group_failed_is_masked() -> None:
    batch, metrics = train_batch(with_failures(3.0, None, 1.0, 0.0), scoring(), GRPO, state())
    assert batch.response_mask.any(-1).tolist() == [False, False, True, True]
    assert not batch.advantages[:2].any() and batch.advantages[2, 0] > 0 > batch.advantages[3, 0]
    assert metrics["actor/masked_fraction"] == 0.5
    assert metrics["reward/score_mean"] == pytest.approx(4 / 3), "but it has a score"
    alone = replace(GRPO, advantages=AdvantageSettings("reinforce"))
    batch, _ = train_batch(with_failures(3.0, None, 1.0, 0.0), scoring(), alone, state())
    assert batch.advantages[:, 0].tolist() == [3.0, 0.0, 1.0, 0.0], "it trains if no samples are compared"
    assert batch.response_mask.any(-1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_rollout_of_failures_alone_trains_nothing(name: str) -> None:
    settings = replace(GRPO, advantages=ESTIMATORS[name], overlong_buffer_length=2)
    values = torch.zeros(4, 3)
    tokens = scoring(ref_log_probs=rollouts().rollout_log_probs, values=values)
    batch, metrics = train_batch(with_failures(None, None, None, None), tokens, settings, state())
    assert not batch.response_mask.any() and not batch.advantages.any() and metrics["actor/masked_fraction"] == 1
    assert all(value == value for value in metrics.values()), "no figure is not a number"


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
