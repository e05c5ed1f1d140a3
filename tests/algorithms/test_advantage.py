import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import advantage_reference as reference
from reference.gspo_cases import random_case
from reference.gspo_reference import kl_table

from roll_gspo.algorithms.advantage import advantages, whiten
from roll_gspo.algorithms.advantage_estimators import AdvantageSettings, RewardParts, token_rewards
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.declarations import ADVANTAGE_ESTIMATORS

MASK = torch.tensor([[True, True, False], [True, True, True]])
GROUPS = torch.tensor([5, 5])


def test_token_rewards_hand_computed():
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False], [True, True, True]])
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask, torch.full((4, 3), 0.5))
    expected = [[-0.5, 0.5, 0.0], [-0.5, 0.0, 1.5], [0.0, 0.0, 0.0], [-0.5, -0.5, 3.5]]
    assert rewards.tolist() == expected


def test_advantages_reinforce_discounts_valid_tokens_only():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    result, _, _ = advantages(torch.tensor([4.0, 8.0]), GROUPS, mask, AdvantageSettings("reinforce", gamma=0.5))
    assert result.tolist() == [[2.0, 4.0, 0.0], [4.0, 0.0, 8.0]]


def test_advantages_grpo_hand_computed():
    result, _, statistics = advantages(torch.tensor([1.0, 0.0]), GROUPS, MASK, AdvantageSettings("grpo"))
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    torch.testing.assert_close(result, torch.tensor([[a, a, 0.0], [-a, -a, -a]]))
    assert statistics["reward/score_mean"] == 0.5
    assert statistics["reward/groups_without_spread"] == 0.0
    assert statistics["advantage/mean"] == pytest.approx(-a / 5)
    assert statistics["advantage/max"] == pytest.approx(a)


def test_advantages_grpo_does_not_normalise_a_second_time():
    scores, groups = torch.tensor([0.0, 1.0, 1.0, 5.0]), torch.tensor([1, 2, 1, 2])
    mask = torch.ones(4, 2, dtype=torch.bool)
    shifted, _, _ = advantages(scores, groups, mask, AdvantageSettings("grpo", reward_norm="group", reward_shift=True))
    assert shifted[:, 0].tolist() == [-0.5, -2.0, 0.5, 2.0]
    once, _, _ = advantages(scores, groups, mask, AdvantageSettings("grpo", reward_norm="group"))
    alone, _, _ = advantages(scores, groups, mask, AdvantageSettings("grpo"))
    torch.testing.assert_close(once, alone)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("dr_grpo", [-2.0, 1.0, 1.0, 0.0]), ("rloo", [-3.0, 1.5, 1.5, 0.0])],
)
def test_advantages_against_the_rest_of_the_group_hand_computed(estimator, expected):
    # Group 1 holds 1, 4, 4: mean 3; without itself 4, 2.5, 2.5. The last sample is alone in its group.
    scores, groups = torch.tensor([1.0, 4.0, 4.0, 7.0]), torch.tensor([1, 1, 1, 5])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    result, _, _ = advantages(scores, groups, mask, AdvantageSettings(estimator))
    assert torch.equal(result, torch.tensor(expected)[:, None] * mask)


@pytest.mark.parametrize("estimator", sorted(ADVANTAGE_ESTIMATORS))
def test_advantages_group_of_one_and_equal_rewards_give_zero(estimator):
    scores, groups = torch.tensor([0.1, 0.1, 0.1, 7.0]), torch.tensor([3, 3, 3, 8])
    mask = torch.ones(4, 2, dtype=torch.bool)
    result, _, statistics = advantages(
        scores,
        groups,
        mask,
        AdvantageSettings(estimator, reward_norm="group", whiten_advantages=True),
        values=torch.zeros(4, 2),
    )
    assert torch.equal(result, torch.zeros(4, 2))
    assert statistics["reward/groups_without_spread"] == 1.0


def test_advantages_empty_sample_has_none():
    mask = torch.tensor([[False, False], [True, False]])
    result, _, _ = advantages(torch.tensor([1.0, 3.0]), GROUPS, mask, AdvantageSettings("reinforce"))
    assert result.tolist() == [[0.0, 0.0], [3.0, 0.0]]


def test_advantages_clip_fractions_are_per_sample_and_per_valid_token():
    result, _, statistics = advantages(
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


@pytest.mark.parametrize(
    ("estimator", "expected", "fraction"),
    [
        ("grpo", [-1.1119, -0.4096, 0.2926, 1.2289], 0.0),
        ("dr_grpo", [-10.0, -10.0, 10.0, 10.0], 1.0),
        ("rloo", [-10.0, -10.0, 10.0, 10.0], 1.0),
        ("raft_plus_plus", [0.0, 0.0, 0.0, 1.0], 0.0),
        ("maxrl", [-1.0, -17.5 / 47.5, 12.5 / 47.5, 52.5 / 47.5], 0.0),
        ("gdpo", [-1.1119, -0.4096, 0.2926, 1.2289], 0.0),
        ("reinforce", [0.0, 10.0, 10.0, 10.0], 0.75),
    ],
)
def test_advantages_clip_follows_the_normalisation_of_the_estimator(estimator, expected, fraction):
    scores, mask = torch.tensor([0.0, 30.0, 60.0, 100.0]), torch.ones(4, 2, dtype=torch.bool)
    chosen = AdvantageSettings(estimator, reward_clip=10.0)
    result, _, statistics = advantages(scores, torch.zeros(4, dtype=torch.int64), mask, chosen)
    torch.testing.assert_close(result, torch.tensor(expected)[:, None].expand(4, 2), rtol=0, atol=1e-4)
    assert statistics["reward/clip_fraction"] == fraction


def test_advantages_maxrl_weighs_rare_right_answers():
    scores = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0, -1.0])
    groups, mask = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 3]), torch.ones(10, 1, dtype=torch.bool)
    result = advantages(scores, groups, mask, AdvantageSettings("maxrl")).advantages
    assert result[:, 0].tolist() == [-1.0, -1.0, -1.0, 3.0, *[0.0] * 6]


def test_advantages_gdpo_tells_one_right_part_from_two():
    # Group 0 differs in both parts, group 1 in one. GRPO of the sum gives both groups the same advantages.
    parts = RewardParts(torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([1.0, 1.0]))
    groups, mask = torch.tensor([0, 0, 1, 1]), torch.ones(4, 1, dtype=torch.bool)
    scores = parts.scores.sum(-1)
    result = advantages(scores, groups, mask, AdvantageSettings("gdpo"), parts=parts).advantages
    two = math.sqrt(2) / math.sqrt(5 / 3)
    torch.testing.assert_close(result[:, 0], torch.tensor([-two, two, -two / 2, two / 2]), rtol=1e-5, atol=0)
    merged = advantages(scores, groups, mask, AdvantageSettings("grpo")).advantages
    torch.testing.assert_close(merged[:2], merged[2:], rtol=1e-5, atol=0)


def test_advantages_token_level_kl_hand_computed():
    log_probs = torch.tensor([[-1.0, -1.0, math.nan], [-2.0, -1.0, -1.0]])
    ref = torch.tensor([[-1.5, -1.0, math.inf], [-1.0, -1.0, -1.0]])
    settings_ = AdvantageSettings("reinforce", add_token_level_kl=True)
    result, _, statistics = advantages(
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


def with_holes(seed: int, batch: int, width: int, hole: float) -> torch.Tensor:
    """A mask with gaps, a sample without a token and one of a single token."""
    generator = torch.Generator().manual_seed(seed)
    mask = random_case(seed, batch, width).mask
    return mask & (torch.rand(batch, width, generator=generator) >= hole)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(2, 8),
    width=st.integers(1, 9),
    hole=st.sampled_from([0.0, 0.3]),
    estimator=st.sampled_from(sorted(ADVANTAGE_ESTIMATORS)),
    norm=st.sampled_from([None, "group", "batch", "running"]),
    discounts=st.sampled_from([(1.0, 1.0), (1.0, 0.95), (0.9, 1.0), (0.9, 0.5), (0.7, 0.0)]),
    reward_clip=st.sampled_from([None, 0.7]),
    kl_coef=st.sampled_from([0.0, 0.3]),
    whitened=st.booleans(),
    advantage_clip=st.sampled_from([None, 0.8]),
    dropped=st.booleans(),
    weights=st.sampled_from([None, (1.0,), (1.0, 0.25), (2.0, -0.5, 1.0)]),
)
def test_advantages_equal_the_reference(
    seed,
    batch,
    width,
    hole,
    estimator,
    norm,
    discounts,
    reward_clip,
    kl_coef,
    whitened,
    advantage_clip,
    dropped,
    weights,
):
    case, mask = random_case(seed, batch, width), with_holes(seed, batch, width, hole)
    generator = torch.Generator().manual_seed(seed)
    scores = (case.old[:, 0] * 4).round() / 4 + 1.5
    groups = torch.randint(-2, 2, (batch,), generator=generator) * 1000
    values = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    loss_mask = mask & (torch.rand(batch, 1, generator=generator) < 0.7) if dropped else mask
    parts = None
    if weights is not None and estimator == "gdpo":
        table = torch.randint(0, 3, (batch, len(weights)), generator=generator).double()
        parts = RewardParts(table, torch.tensor(weights))
    gamma, lambd = discounts
    chosen = AdvantageSettings(
        estimator,
        gamma,
        norm,
        reward_clip=reward_clip,
        add_token_level_kl=bool(kl_coef),
        kl_penalty="k3",
        whiten_advantages=whitened,
        advantage_clip=advantage_clip,
        lambd=lambd,
    )
    ours = advantages(
        scores,
        groups,
        mask,
        chosen,
        log_probs=case.old,
        ref_log_probs=case.ref,
        kl_coef=kl_coef,
        running=RunningMoments(),
        values=values,
        loss_mask=loss_mask if dropped else None,
        parts=parts,
    )
    kl = kl_table(case.old.tolist(), case.ref.tolist(), mask.tolist(), "k3")
    theirs, returns = reference.advantages(
        scores.tolist(),
        groups.tolist(),
        mask.tolist(),
        loss_mask.tolist(),
        estimator,
        norm,
        gamma,
        lambd,
        values.tolist(),
        reward_clip,
        [[kl_coef * x for x in row] for row in kl],
        whitened,
        advantage_clip,
        None if parts is None else list(zip(weights, parts.scores.T.tolist(), strict=True)),
    )
    torch.testing.assert_close(ours.advantages, torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert (ours.returns is not None) == (estimator == "gae")
    if ours.returns is not None:
        torch.testing.assert_close(ours.returns, torch.tensor(returns, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("estimator", sorted(ADVANTAGE_ESTIMATORS))
def test_advantages_do_not_depend_on_the_order_of_samples(estimator):
    case = random_case(11, batch=8)
    scores, groups = case.old[:, 0], torch.tensor([3, 9, 3, 9, 1, 3, 1, 9])
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    chosen = AdvantageSettings(estimator, reward_norm="batch", whiten_advantages=True)
    whole = advantages(scores, groups, case.mask, chosen, values=case.ref)
    permuted = advantages(scores[order], groups[order], case.mask[order], chosen, values=case.ref[order])
    torch.testing.assert_close(permuted.advantages, whole.advantages[order])
    if whole.returns is not None:
        torch.testing.assert_close(permuted.returns, whole.returns[order])


@pytest.mark.parametrize("estimator", sorted(ADVANTAGE_ESTIMATORS))
def test_advantages_masked_garbage_never_leaks(estimator):
    case = random_case(5, batch=6, dtype=torch.float32)
    scores, groups = case.old[:, 0], torch.tensor([0, 0, 1, 1, 1, 7])
    chosen = AdvantageSettings(estimator, 0.9, add_token_level_kl=True, whiten_advantages=True)
    clean = [case.old, case.ref, case.advantages]
    garbage = torch.tensor([math.nan, math.inf, -math.inf]).repeat(6, 3)[:, : case.mask.shape[1]]
    dirty = [torch.where(case.mask, x, garbage) for x in clean]
    results = [
        advantages(scores, groups, case.mask, chosen, log_probs=a, ref_log_probs=b, kl_coef=0.1, values=v)
        for a, b, v in (clean, dirty)
    ]
    assert torch.equal(results[0].advantages, results[1].advantages)
    assert bool(results[1].advantages.isfinite().all())
    assert results[0].statistics == results[1].statistics
    if estimator == "gae":
        assert torch.equal(results[0].returns, results[1].returns)


@pytest.mark.parametrize("estimator", sorted(ADVANTAGE_ESTIMATORS))
def test_advantages_of_half_precision_are_float32(estimator):
    case = random_case(8, batch=6, dtype=torch.bfloat16)
    scores, groups = case.old[:, 0], torch.tensor([0, 0, 1, 1, 1, 7])
    chosen = AdvantageSettings(estimator, 0.9, add_token_level_kl=True)
    half, single = (
        advantages(
            scores.to(dtype),
            groups,
            case.mask,
            chosen,
            log_probs=case.old.to(dtype),
            ref_log_probs=case.ref.to(dtype),
            kl_coef=0.1,
            values=case.advantages.to(dtype),
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert half.advantages.dtype == torch.float32
    torch.testing.assert_close(half.advantages, single.advantages, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", sorted(ADVANTAGE_ESTIMATORS))
@pytest.mark.parametrize("seen", [MASK.new_zeros(2, 3), None])
def test_advantages_without_a_token_to_train_are_zero(estimator, seen):
    mask = MASK if seen is not None else MASK.new_zeros(2, 3)
    result = advantages(
        torch.tensor([1.0, 2.0]), GROUPS, mask, AdvantageSettings(estimator), values=torch.ones(2, 3), loss_mask=seen
    )
    assert torch.equal(result.advantages, torch.zeros(2, 3))
    names = ("mean", "std", "min", "max", "clip_fraction")
    assert [result.statistics[f"advantage/{name}"] for name in names] == [0.0] * 5


def test_advantages_masked_out_samples_count_in_their_group_only():
    # Group mean 2; the second sample is out of the loss, so whitening sees the deviations -2, -2 and 1 alone.
    scores, groups = torch.tensor([0.0, 3.0, 3.0]), torch.tensor([4, 4, 4])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    loss_mask = mask & torch.tensor([[True], [False], [True]])
    result = advantages(scores, groups, mask, AdvantageSettings("dr_grpo"), loss_mask=loss_mask)
    assert result.advantages.tolist() == [[-2.0, -2.0], [0.0, 0.0], [1.0, 0.0]]
    assert result.statistics["advantage/mean"] == -1.0
    assert result.statistics["advantage/std"] == pytest.approx(math.sqrt(3))
    whitened = advantages(
        scores, groups, mask, AdvantageSettings("dr_grpo", whiten_advantages=True), loss_mask=loss_mask
    )
    root = math.sqrt(3)
    torch.testing.assert_close(whitened.advantages, torch.tensor([[-1 / root, -1 / root], [0.0, 0.0], [2 / root, 0.0]]))
    assert whitened.statistics["advantage/mean"] == pytest.approx(0.0)
    assert whitened.statistics["advantage/max"] == pytest.approx(2 / root)


def test_advantages_reinforce_plus_plus_hand_computed():
    # Reward-to-go of the KL-shaped reward: r - beta sum_(i >= t) kl_i; then mean 2, std 1 over the valid tokens.
    log_probs, ref = torch.tensor([[1.0, 0.0, 9.0], [0.0, 0.0, -1.0]]), torch.zeros(2, 3)
    mask = torch.tensor([[True, True, False], [False, False, True]])
    chosen = AdvantageSettings("reinforce_plus_plus", add_token_level_kl=True)
    result = advantages(
        torch.tensor([2.0, 2.0]), GROUPS, mask, chosen, log_probs=log_probs, ref_log_probs=ref, kl_coef=1.0
    )
    torch.testing.assert_close(result.advantages, torch.tensor([[-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert result.statistics["reward/kl"] == 0.0


def test_advantages_reinforce_plus_plus_baseline_hand_computed():
    # Minus the group means 0.5 and 7: -0.5, 0.5, 0 on 1, 1 and 1 tokens; std 0.5.
    scores, groups = torch.tensor([0.0, 1.0, 7.0]), torch.tensor([1, 1, 2])
    result = advantages(
        scores, groups, torch.ones(3, 1, dtype=torch.bool), AdvantageSettings("reinforce_plus_plus_baseline")
    )
    torch.testing.assert_close(result.advantages, torch.tensor([[-1.0], [1.0], [0.0]]))


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_advantages_are_whitened_once(estimator):
    case = random_case(3, batch=6)
    scores, groups = case.old[:, 0], torch.tensor([1, 1, 1, 2, 2, 2])
    by_definition, _, statistics = advantages(scores, groups, case.mask, AdvantageSettings(estimator))
    asked_for, _, _ = advantages(scores, groups, case.mask, AdvantageSettings(estimator, whiten_advantages=True))
    assert torch.equal(by_definition, asked_for)
    seen = by_definition[case.mask]
    assert float(seen.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(seen.std()) == pytest.approx(1.0, abs=1e-7)
    for name, value in (("mean", seen.mean()), ("std", seen.std()), ("min", seen.min()), ("max", seen.max())):
        assert statistics[f"advantage/{name}"] == pytest.approx(float(value), abs=1e-12)


def test_advantages_raft_plus_plus_trains_the_best_samples_alone():
    # Group 1: two best tie. Group 2: all wrong. Group 3: the best is negative. Group 4: all right.
    scores = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, -0.5, -1.0, 1.0, 1.0])
    groups = torch.tensor([1, 1, 1, 2, 2, 3, 3, 4, 4])
    mask = torch.ones(9, 1, dtype=torch.bool)
    result, _, _ = advantages(scores, groups, mask, AdvantageSettings("raft_plus_plus"))
    assert result[:, 0].tolist() == [1, 0, 1, 0, 0, 0, 0, 1, 1]
    shifted, _, _ = advantages(
        scores, groups, mask, AdvantageSettings("raft_plus_plus", reward_norm="group", reward_shift=True)
    )
    assert shifted[:, 0].tolist() == [1, 0, 1, 0, 0, 1, 0, 0, 0]


def test_advantages_raft_plus_plus_ranks_without_the_kl():
    log_probs, ref = torch.tensor([[0.5], [0.0], [0.25]]), torch.zeros(3, 1)
    chosen = AdvantageSettings("raft_plus_plus", add_token_level_kl=True)
    result, _, _ = advantages(
        torch.tensor([1.0, 0.5, 1.0]),
        torch.tensor([1, 1, 1]),
        torch.ones(3, 1, dtype=torch.bool),
        chosen,
        log_probs=log_probs,
        ref_log_probs=ref,
        kl_coef=0.2,
    )
    torch.testing.assert_close(result, torch.tensor([[0.9], [0.0], [0.95]]))


def test_advantages_opo_hand_computed():
    # Lengths 1 and 3: the baseline is (1 * 4 + 3 * 0) / 4 = 1.
    mask = torch.tensor([[True, False, False], [True, True, True], [True, False, False]])
    result, _, _ = advantages(torch.tensor([4.0, 0.0, 5.0]), torch.tensor([1, 1, 2]), mask, AdvantageSettings("opo"))
    assert result.tolist() == [[3.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]]


def test_advantages_gae_hand_computed():
    # gamma 0.5, lambd 0.5, values 1, 2 and reward 4 at the end: deltas 0.5 * 2 - 1 = 0 and 4 - 2 = 2.
    mask = torch.tensor([[True, False, True], [False, False, False]])
    values = torch.tensor([[1.0, math.nan, 2.0], [math.inf, 3.0, 3.0]])
    chosen = AdvantageSettings("gae", gamma=0.5, lambd=0.5)
    result = advantages(torch.tensor([4.0, 1.0]), GROUPS, mask, chosen, values=values)
    assert result.advantages.tolist() == [[0.5, 0.0, 2.0], [0.0, 0.0, 0.0]]
    assert result.returns.tolist() == [[1.5, 0.0, 4.0], [0.0, 0.0, 0.0]]
    whitened = advantages(
        torch.tensor([4.0, 1.0]),
        GROUPS,
        mask,
        AdvantageSettings("gae", gamma=0.5, lambd=0.5, whiten_advantages=True),
        values=values,
    )
    assert torch.equal(whitened.returns, result.returns)
    torch.testing.assert_close(whitened.advantages[0, ::2], torch.tensor([-0.5, 0.5]) * math.sqrt(2))


def test_advantages_gae_with_lambda_one_is_reward_to_go_minus_value():
    case = random_case(2, batch=6, width=9)
    scores, groups = case.old[:, 0], torch.arange(6)
    result = advantages(scores, groups, case.mask, AdvantageSettings("gae", lambd=1.0), values=case.ref)
    expected = torch.where(case.mask, scores[:, None] - case.ref, 0.0)
    torch.testing.assert_close(result.advantages, expected)
    torch.testing.assert_close(result.returns, torch.where(case.mask, scores[:, None], 0.0))


def test_advantages_gae_without_values_is_refused():
    with pytest.raises(ValueError, match="'gae' got no values"):
        advantages(torch.tensor([1.0, 2.0]), GROUPS, MASK, AdvantageSettings("gae"))
