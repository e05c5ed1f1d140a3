import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gspo_reference as reference

from roll_gspo.algorithms.reward_norm import (
    RunningMoments,
    clip_rewards,
    groups_without_spread,
    normalise_rewards,
)

SCORES = torch.tensor([1.0, 5.0, 3.0, 5.0, 7.0])
GROUPS = torch.tensor([42, -7, 42, -7, 9])


def test_normalise_rewards_group_hand_computed():
    # group 42: mean 2, std sqrt 2; group -7: no spread; group 9: alone
    root = 2**0.5
    expected = torch.tensor([-1 / (root + 1e-6), 0.0, 1 / (root + 1e-6), 0.0, 0.0])
    torch.testing.assert_close(normalise_rewards(SCORES, GROUPS, "group"), expected)
    shifted = normalise_rewards(SCORES, GROUPS, "group", reward_shift=True)
    assert shifted.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0]
    scaled = normalise_rewards(SCORES, GROUPS, "group", reward_scale=True)
    torch.testing.assert_close(scaled[[0, 2]], torch.tensor([1.0, 3.0]) / (root + 1e-6))


def test_normalise_rewards_batch_hand_computed():
    expected = (SCORES - 4.2) / (5.2**0.5 + 1e-6)
    torch.testing.assert_close(normalise_rewards(SCORES, GROUPS, "batch"), expected)


def test_normalise_rewards_none_leaves_scores():
    assert torch.equal(normalise_rewards(SCORES, GROUPS, None), SCORES)
    assert normalise_rewards(SCORES.bfloat16(), GROUPS, None).dtype == torch.float32


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1, -7e-8])
def test_normalise_rewards_equal_scores_give_exactly_zero(norm, value):
    for dtype in (torch.float32, torch.float64):
        scores = torch.full((7,), value, dtype=dtype)
        normalised = normalise_rewards(scores, torch.tensor([3, 3, 3, 1, 1, 1, 1]), norm)
        assert normalised.tolist() == [0.0] * 7


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(-40, 40), st.integers(-3, 3)), min_size=1, max_size=12),
    norm=st.sampled_from([None, "group", "batch", "running"]),
    form=st.sampled_from(["both", "shift", "scale"]),
)
def test_normalise_rewards_equals_the_reference_in_any_order(rows, norm, form):
    form = "both" if norm is None else form
    scores, groups = [r / 8 for r, _ in rows], [g for _, g in rows]
    normalised = normalise_rewards(
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(groups),
        norm,
        form == "shift",
        form == "scale",
        RunningMoments(),
    )
    expected = reference.normalised(scores, groups, norm, form)
    torch.testing.assert_close(normalised, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_normalise_rewards_running_needs_moments():
    with pytest.raises(ValueError, match="RunningMoments"):
        normalise_rewards(SCORES, GROUPS, "running")


def test_running_moments_of_pieces_are_those_of_the_whole():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    moments = RunningMoments()
    for piece in (values[:1], values[1:1], values[1:20], values[20:]):
        moments.update(piece)
    assert moments.count == 50
    assert moments.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(values.std()), rel=1e-10)


def test_running_moments_leave_out_what_is_not_finite():
    moments, clean = RunningMoments(), RunningMoments()
    moments.update(torch.tensor([1.0, math.nan, 3.0]))
    moments.update(torch.tensor([math.inf, -math.inf]))
    moments.update(torch.tensor([8.0]))
    clean.update(torch.tensor([1.0, 3.0, 8.0]))
    assert moments.count == 3
    assert moments.mean == pytest.approx(clean.mean, rel=1e-12)
    assert moments.std == pytest.approx(clean.std, rel=1e-12)


def test_running_moments_resume():
    moments, resumed = RunningMoments(), RunningMoments()
    normalise_rewards(SCORES, GROUPS, "running", running=moments)
    resumed.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    later = SCORES * 2 - 1
    first = normalise_rewards(later, GROUPS, "running", running=moments)
    assert torch.equal(first, normalise_rewards(later, GROUPS, "running", running=resumed))
    assert not torch.equal(first, normalise_rewards(later, GROUPS, "batch"))


def test_clip_rewards_counts_what_was_beyond():
    clipped, fraction = clip_rewards(torch.tensor([-3.0, -2.0, 0.0, 2.5]), 2.0)
    assert clipped.tolist() == [-2.0, -2.0, 0.0, 2.0]
    assert fraction == 0.5
    assert clip_rewards(SCORES, None) == (SCORES, 0.0)


def test_groups_without_spread_hand_computed():
    assert groups_without_spread(SCORES, GROUPS) == pytest.approx(2 / 3)
