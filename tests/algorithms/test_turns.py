"""Advantages of turns: hand-computed, against plain loops, and those of samples if every sample is one turn."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import credit_reference as reference

from roll_gspo.algorithms.advantage import advantages
from roll_gspo.algorithms.advantage_estimators import AdvantageSettings
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.algorithms.turns import Turns
from roll_gspo.declarations import ADVANTAGE_ESTIMATORS

ESTIMATORS = sorted(ADVANTAGE_ESTIMATORS)
OF_TURNS = [name for name in ESTIMATORS if not ADVANTAGE_ESTIMATORS.declaration(name).whole_samples]
WITHOUT_CRITIC = [name for name in OF_TURNS if not ADVANTAGE_ESTIMATORS.declaration(name).needs_critic]
BASELINES = ["turn", "group", "state"]

# Two episodes of one group: turns of 2 and 1 tokens with a gap of one, and turns of 1, 1 and 2 tokens without one
# between the last two.
MASK = torch.tensor([[True, True, False, True, False, False], [True, False, True, True, True, False]])
TURNS = Turns(
    rewards=torch.tensor([1.0, 2.0, 0.0, 4.0, -2.0]),
    samples=torch.tensor([0, 0, 1, 1, 1]),
    numbers=torch.tensor([0, 1, 0, 1, 2]),
    states=torch.tensor([0, 1, 0, 2, 1]),
    of_tokens=torch.tensor([[0, 0, 1, 1, 1, 1], [2, 3, 3, 4, 4, 4]]),
)
GROUP = torch.tensor([7, 7])
SCORES = torch.tensor([3.0, 2.0])


def of(estimator: str, **changes: object) -> AdvantageSettings:
    return AdvantageSettings(estimator, credit="turn", **changes)  # type: ignore[arg-type]


def test_returns_are_discounted_per_turn() -> None:
    assert TURNS.returns(1.0).tolist() == [3.0, 2.0, 2.0, 2.0, -2.0]
    assert TURNS.returns(0.5).tolist() == [2.0, 2.0, 1.5, 3.0, -2.0]
    assert TURNS.discounted_sums(0.5).tolist() == [2.0, 1.5]


def test_groups_are_turns_of_the_same_number_or_state_or_all() -> None:
    def partition(baseline: str, group_ids: torch.Tensor = GROUP) -> list[list[int]]:
        ids = TURNS.groups(group_ids, baseline).tolist()
        return [[n for n, each in enumerate(ids) if each == one] for one in dict.fromkeys(ids)]

    assert partition("group") == [[0, 1, 2, 3, 4]]
    assert partition("turn") == [[0, 2], [1, 3], [4]]
    assert partition("state") == [[0, 2], [1, 4], [3]]
    assert partition("turn", torch.tensor([5, 3])) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("baseline", "first", "second"),
    [
        # returns 3, 2 and 2, 2, -2
        ("turn", [0.5, 0.5, 0, 0.0, 0, 0], [-0.5, 0, 0.0, 0.0, 0.0, 0]),
        ("group", [1.6, 1.6, 0, 0.6, 0, 0], [0.6, 0, 0.6, -3.4, -3.4, 0]),
        ("state", [0.5, 0.5, 0, 2.0, 0, 0], [-0.5, 0, 0.0, -2.0, -2.0, 0]),
    ],
)
def test_each_turn_has_its_return_minus_the_mean_of_those_it_is_compared_with(
    baseline: str, first: list[float], second: list[float]
) -> None:
    found = advantages(SCORES, GROUP, MASK, of("dr_grpo", turn_baseline=baseline), turns=TURNS)
    torch.testing.assert_close(found.advantages, torch.tensor([first, second]))


def test_weights_add_the_advantages_of_episode_and_turn() -> None:
    # 3 - 2.5 = 0.5 of the first episode, -0.5 of the second; undiscounted, although the turns are
    settings = of("dr_grpo", episode_reward_weight=2.0, step_reward_weight=3.0, step_reward_gamma=0.5)
    found = advantages(SCORES, GROUP, MASK, settings, turns=TURNS)
    # returns 2, 2 and 1.5, 3, -2
    first = [1 + 0.75, 1 + 0.75, 0, 1 - 1.5, 0, 0]
    second = [-1 - 0.75, 0, -1 + 1.5, -1 + 0.0, -1 + 0.0, 0]
    torch.testing.assert_close(found.advantages, torch.tensor([first, second]))
    assert found.statistics["reward/turn_mean"] == 1.0
    assert found.statistics["reward/turn_groups_without_spread"] == pytest.approx(1 / 3)
    distances = [1.125, -1.125, -1.75 + 2.25 / 3, 0.5 + 2.25 / 3, -1 + 2.25 / 3]
    expected = (sum(d**2 for d in distances) / 5) ** 0.5
    assert found.statistics["advantage/turn_std"] == pytest.approx(expected)


def test_reinforce_gives_each_turn_its_return() -> None:
    found = advantages(SCORES, GROUP, MASK, of("reinforce", step_reward_gamma=0.5, gamma=0.5), turns=TURNS)
    # 0.5 per token within a turn, and per turn
    assert found.advantages.tolist() == [[1.0, 2.0, 0, 2.0, 0, 0], [1.5, 0, 3.0, -1.0, -2.0, 0]]


def test_episode_has_the_discounted_sum() -> None:
    settings = AdvantageSettings("dr_grpo", step_reward_gamma=0.5)
    assert settings.needs_turns
    found = advantages(SCORES, GROUP, MASK, settings, turns=TURNS)
    torch.testing.assert_close(found.advantages, torch.where(MASK, torch.tensor([[0.25], [-0.25]]), 0.0))
    assert found.statistics["reward/score_mean"] == 2.5, "the score is undiscounted"


def test_gae_has_the_reward_of_a_turn_at_its_last_token_and_skips_the_gap() -> None:
    values = torch.tensor([[1.0, 2.0, 99.0, 4.0, 99.0, 99.0], [0.0] * 6])
    found = advantages(SCORES, GROUP, MASK, of("gae", gamma=0.5, lambd=0.5), values=values, turns=TURNS)
    # deltas 0 + 0.5 * 2 - 1 = 0, 1 + 0.5 * 4 - 2 = 1 (the next value is behind the gap), 2 + 0 - 4 = -2
    first = [0 + 0.25 * (1 + 0.25 * -2), 1 + 0.25 * -2, 0, -2.0, 0, 0]
    # deltas 0, 4, 0, -2
    second = [0 + 0.25 * (4 + 0.25 * (0 + 0.25 * -2)), 0, 4 + 0.25 * (0 + 0.25 * -2), 0 + 0.25 * -2, -2.0, 0]
    torch.testing.assert_close(found.advantages, torch.tensor([first, second]))
    assert found.returns is not None
    torch.testing.assert_close(found.returns, torch.where(MASK, found.advantages + values, 0.0))


def random_turns(seed: int) -> tuple[list[list[reference.Turn]], list[int], torch.Tensor, Turns]:
    """Return episodes of 1 to 4 turns of 1 to 3 tokens, most with a gap between them, their groups, mask and turns."""
    rng = random.Random(seed)
    episodes: list[list[reference.Turn]] = []
    for _ in range(rng.randint(2, 6)):
        start, turns = 0, []
        for _ in range(rng.randint(1, 4)):
            length = rng.randint(1, 3)
            state = "" if not turns else rng.choice("ab")
            turns.append((rng.randint(-2, 4) / 4, list(range(start, start + length)), state))
            start += length + rng.randint(0, 2)
        episodes.append(turns)
    groups = [rng.choice([3, -1]) for _ in episodes]
    width = max(turns[-1][1][-1] for turns in episodes) + 2
    mask = torch.zeros(len(episodes), width, dtype=torch.bool)
    of_tokens = torch.zeros(len(episodes), width, dtype=torch.int64)
    listed = [(i, t) for i, turns in enumerate(episodes) for t in range(len(turns))]
    for n, (i, t) in enumerate(listed):
        mask[i, episodes[i][t][1]] = True
        of_tokens[i, episodes[i][t][1]] = n
    turns = Turns(
        torch.tensor([episodes[i][t][0] for i, t in listed], dtype=torch.float64),
        torch.tensor([i for i, _ in listed]),
        torch.tensor([t for _, t in listed]),
        torch.tensor([" ab".index(episodes[i][t][2] or " ") for i, t in listed]),
        of_tokens,
    )
    return episodes, groups, mask, turns


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    estimator=st.sampled_from(WITHOUT_CRITIC),
    norm=st.sampled_from([None, "group", "batch"]),
    baseline=st.sampled_from(BASELINES),
    gamma=st.sampled_from([1.0, 0.9, 0.3]),
    weights=st.sampled_from([(0.0, 1.0), (1.0, 1.0), (0.5, 2.0), (1.0, 0.0)]),
    reward_clip=st.sampled_from([None, 0.7]),
)
def test_turns_equal_the_reference(
    seed: int,
    estimator: str,
    norm: str | None,
    baseline: str,
    gamma: float,
    weights: tuple[float, float],
    reward_clip: float | None,
) -> None:
    episodes, groups, mask, turns = random_turns(seed)
    of_episode, of_turn = weights
    chosen = of(
        estimator,
        reward_norm=norm,
        turn_baseline=baseline,
        step_reward_gamma=gamma,
        episode_reward_weight=of_episode,
        step_reward_weight=of_turn,
        reward_clip=reward_clip,
    )
    scores = torch.tensor([sum(r for r, _, _ in turns) for turns in episodes], dtype=torch.float64)
    ours = advantages(scores, torch.tensor(groups), mask, chosen, turns=turns)
    theirs = torch.tensor(
        reference.turn_advantages(
            *(episodes, groups, mask.shape[1], estimator, norm, baseline, gamma, of_episode, of_turn, reward_clip)
        ),
        dtype=torch.float64,
    )
    if chosen.whitens:
        seen = theirs[mask]
        spread = seen.std() if len(seen) > 1 and bool((seen - seen[0]).abs().max() > 1e-9) else None
        if len(seen) > 1:
            theirs = torch.where(mask, (theirs - seen.mean()) / ((spread or 0.0) + 1e-8), 0.0)
        if spread is None:
            return
    torch.testing.assert_close(ours.advantages, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("norm", [None, "group", "batch", "running"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_turn_is_the_sample_bit_for_bit(estimator: str, norm: str | None, baseline: str) -> None:
    generator = torch.Generator().manual_seed(5)
    scores = (torch.randn(12, generator=generator) * 4).round() / 3
    group_ids = torch.tensor([9, 2, 9, 2, 5, 5, 9, 2, 5, 5, 1, 1])
    mask = torch.rand(12, 7, generator=generator) < 0.8
    values = torch.randn(12, 7, generator=generator)
    count = torch.arange(12)
    turns = Turns(scores, count, torch.zeros(12, dtype=torch.int64), count * 0, count[:, None].expand(12, 7))
    plain = AdvantageSettings(estimator, 0.9, reward_norm=norm, reward_clip=1.5, advantage_clip=2.0)
    expected = advantages(scores, group_ids, mask, plain, values=values, running=RunningMoments())
    for credit in ("episode", "turn"):
        chosen = replace(plain, credit=credit, step_reward_gamma=0.7, turn_baseline=baseline)
        found = advantages(scores, group_ids, mask, chosen, values=values, running=RunningMoments(), turns=turns)
        assert torch.equal(found.advantages, expected.advantages)
        assert expected.returns is None or torch.equal(found.returns, expected.returns)  # type: ignore[arg-type]
        same = {name: value for name, value in found.statistics.items() if "turn" not in name}
        assert same == expected.statistics


@pytest.mark.parametrize("estimator", OF_TURNS)
def test_masked_garbage_never_leaks(estimator: str) -> None:
    values = torch.where(MASK, 0.5, torch.nan)
    found = advantages(SCORES, GROUP, MASK, of(estimator), values=values, turns=TURNS)
    assert found.advantages.isfinite().all() and not found.advantages[~MASK].any()


def test_token_level_kl_is_refused() -> None:
    zeros = torch.zeros(MASK.shape)
    settings = of("grpo", add_token_level_kl=True)
    with pytest.raises(ValueError, match="add_token_level_kl"):
        advantages(SCORES, GROUP, MASK, settings, log_probs=zeros, ref_log_probs=zeros, turns=TURNS)
