import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gspo_reference as reference
from reference.gspo_cases import random_case

from roll_gspo.algorithms.advantage import (
    ADVANTAGE_ESTIMATORS,
    AdvantageSettings,
    advantages,
    token_rewards,
    whiten,
)
from roll_gspo.algorithms.reward_norm import RunningMoments

MASK = torch.tensor([[True, True, False], [True, True, True]])
GROUPS = torch.tensor([5, 5])


def test_token_rewards_hand_computed():
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False], [True, True, True]])
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask, torch.full((4, 3), 0.5))
    expected = [[-0.5, 0.5, 0.0], [-0.5, 0.0, 1.5], [0.0, 0.0, 0.0], [-0.5, -0.5, 3.5]]
    assert rewards.tolist() == expected


def test_advantages_reinforce_discounts_valid_tokens_only():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    result, _ = advantages(torch.tensor([4.0, 8.0]), GROUPS, mask, AdvantageSettings("reinforce", gamma=0.5))
    assert result.tolist() == [[2.0, 4.0, 0.0], [4.0, 0.0, 8.0]]


def test_advantages_grpo_hand_computed():
    result, statistics = advantages(torch.tensor([1.0, 0.0]), GROUPS, MASK, AdvantageSettings("grpo"))
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    torch.testing.assert_close(result, torch.tensor([[a, a, 0.0], [-a, -a, -a]]))
    assert statistics["reward/score_mean"] == 0.5
    assert statistics["reward/groups_without_spread"] == 0.0
    assert statistics["advantage/mean"] == pytest.approx(-a / 5)
    assert statistics["advantage/max"] == pytest.approx(a)


def test_advantages_grpo_does_not_normalise_a_second_time():
    scores, groups = torch.tensor([0.0, 1.0, 1.0, 5.0]), torch.tensor([1, 2, 1, 2])
    mask = torch.ones(4, 2, dtype=torch.bool)
    shifted, _ = advantages(scores, groups, mask, AdvantageSettings("grpo", reward_norm="group", reward_shift=True))
    assert shifted[:, 0].tolist() == [-0.5, -2.0, 0.5, 2.0]
    once, _ = advantages(scores, groups, mask, AdvantageSettings("grpo", reward_norm="group"))
    alone, _ = advantages(scores, groups, mask, AdvantageSettings("grpo"))
    torch.testing.assert_close(once, alone)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("dr_grpo", [-2.0, 1.0, 1.0, 0.0]), ("rloo", [-3.0, 1.5, 1.5, 0.0])],
)
def test_advantages_against_the_rest_of_the_group_hand_computed(estimator, expected):
    # Group 1 holds 1, 4, 4: mean 3; without itself 4, 2.5, 2.5. The last sample is alone in its group.
    scores, groups = torch.tensor([1.0, 4.0, 4.0, 7.0]), torch.tensor([1, 1, 1, 5])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    result, _ = advantages(scores, groups, mask, AdvantageSettings(estimator))
    assert torch.equal(result, torch.tensor(expected)[:, None] * mask)


@pytest.mark.parametrize("estimator", sorted(ADVANTAGE_ESTIMATORS))
def test_advantages_group_of_one_and_equal_rewards_give_zero(estimator):
    scores, groups = torch.tensor([0.1, 0.1, 0.1, 7.0]), torch.tensor([3, 3, 3, 8])
    mask = torch.ones(4, 2, dtype=torch.bool)
    result, statistics = advantages(
        scores, groups, mask, AdvantageSettings(estimator, reward_norm="group", whiten_advantages=True)
    )
    assert torch.equal(result, torch.zeros(4, 2))
    assert statistics["reward/groups_without_spread"] == 1.0


def test_advantages_empty_sample_has_none():
    mask = torch.tensor([[False, False], [True, False]])
    result, _ = advantages(torch.tensor([1.0, 3.0]), GROUPS, mask, AdvantageSettings("reinforce"))
    assert result.tolist() == [[0.0, 0.0], [3.0, 0.0]]


def test_advantages_clip_fractions_are_per_sample_and_per_valid_token():
    result, statistics = advantages(
        torch.tensor([4.0, 1.0]),
        GROUPS,
        MASK,
        AdvantageSettings("reinforce", reward_clip=3.0, advantage_clip=2.0),
    )
    assert result.tolist() == [[2.0, 2.0, 0.0], [1.0, 1.0, 1.0]]
    assert statistics["reward/mean"] == 2.0
    assert statistics["reward/clip_fraction"] == 0.5
    assert statistics["advantage/clip_fraction"] == pytest.approx(2 / 5)
    assert statistics["advantage/max"] == 3.0


def test_advantages_token_level_kl_hand_computed():
    log_probs = torch.tensor([[-1.0, -1.0, math.nan], [-2.0, -1.0, -1.0]])
    ref = torch.tensor([[-1.5, -1.0, math.inf], [-1.0, -1.0, -1.0]])
    settings_ = AdvantageSettings("reinforce", add_token_level_kl=True)
    result, statistics = advantages(
        torch.tensor([1.0, 2.0]), GROUPS, MASK, settings_, log_probs=log_probs, ref_log_probs=ref, kl_coef=0.1
    )
    torch.testing.assert_close(result, torch.tensor([[0.95, 1.0, 0.0], [2.1, 2.0, 2.0]]))
    assert statistics["reward/kl"] == pytest.approx((0.5 - 1.0) / 5)
    with pytest.raises(ValueError, match="ref_log_probs"):
        advantages(torch.tensor([1.0, 2.0]), GROUPS, MASK, settings_)


def test_whiten_hand_computed_over_valid_tokens():
    whitened = whiten(torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, 9.0]]), MASK)
    torch.testing.assert_close(whitened[MASK].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(whitened[MASK].std(), torch.tensor(1.0))
    assert float(whitened[0, 2]) == 0.0


def test_whiten_leaves_fewer_than_two_tokens():
    mask = torch.tensor([[True, False], [False, False]])
    assert whiten(torch.tensor([[3.0, math.nan], [1.0, 1.0]]), mask).tolist() == [[3.0, 0.0], [0.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(2, 8),
    width=st.integers(1, 6),
    estimator=st.sampled_from(sorted(ADVANTAGE_ESTIMATORS)),
    norm=st.sampled_from([None, "group", "batch", "running"]),
    gamma=st.sampled_from([1.0, 0.9]),
    reward_clip=st.sampled_from([None, 0.7]),
    kl_coef=st.sampled_from([0.0, 0.3]),
    whitened=st.booleans(),
    advantage_clip=st.sampled_from([None, 0.8]),
)
def test_advantages_equal_the_reference(
    seed, batch, width, estimator, norm, gamma, reward_clip, kl_coef, whitened, advantage_clip
):
    case = random_case(seed, batch, width)
    scores = (case.old[:, 0] * 4).round() / 4
    groups = torch.randint(-2, 2, (batch,), generator=torch.Generator().manual_seed(seed)) * 1000
    ours, _ = advantages(
        scores,
        groups,
        case.mask,
        AdvantageSettings(
            estimator,
            gamma,
            norm,
            reward_clip=reward_clip,
            add_token_level_kl=bool(kl_coef),
            kl_penalty="k3",
            whiten_advantages=whitened,
            advantage_clip=advantage_clip,
        ),
        log_probs=case.old,
        ref_log_probs=case.ref,
        kl_coef=kl_coef,
        running=RunningMoments(),
    )
    kl = reference.kl_table(case.old.tolist(), case.ref.tolist(), case.mask.tolist(), "k3")
    theirs = reference.advantages(
        scores.tolist(),
        groups.tolist(),
        case.mask.tolist(),
        estimator,
        norm,
        gamma,
        reward_clip,
        [[kl_coef * x for x in row] for row in kl],
        whitened,
        advantage_clip,
    )
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_advantages_do_not_depend_on_the_order_of_samples():
    case = random_case(11, batch=8)
    scores, groups = case.old[:, 0], torch.tensor([3, 9, 3, 9, 1, 3, 1, 9])
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    chosen = AdvantageSettings("grpo", reward_norm="batch", whiten_advantages=True)
    whole, _ = advantages(scores, groups, case.mask, chosen)
    permuted, _ = advantages(scores[order], groups[order], case.mask[order], chosen)
    torch.testing.assert_close(permuted, whole[order])


def test_advantage_settings_refuse_unknown_names():
    with pytest.raises(ValueError, match="adv_estimator: unknown value 'gre'"):
        AdvantageSettings("gre")
    with pytest.raises(ValueError, match="kl_penalty"):
        AdvantageSettings(kl_penalty="full")
    with pytest.raises(ValueError, match="both true"):
        AdvantageSettings(reward_norm="group", reward_shift=True, reward_scale=True)
