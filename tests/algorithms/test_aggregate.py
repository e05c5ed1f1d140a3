import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gspo_reference as reference
from reference.gspo_cases import random_case

from roll_gspo.algorithms.aggregate import LOSS_AGG_MODES, Denominators, aggregate

MODES = sorted(LOSS_AGG_MODES)
VALUES = torch.tensor([[1.0, 2.0, math.nan], [4.0, 5.0, 6.0], [math.inf, 0.0, -math.inf]])
MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 18 / 5),
        ("seq-mean-token-sum", (3 + 15) / 2),
        ("seq-mean-token-mean", (1.5 + 5) / 2),
        ("seq-mean-token-sum-norm", (3 + 15) / (2 * 8)),
    ],
)
def test_aggregate_hand_computed(mode, expected):
    values = VALUES.clone().requires_grad_()
    share = aggregate(values, MASK, Denominators.of(MASK), mode, response_length=8)
    share.backward()
    assert float(share.detach()) == pytest.approx(expected)
    assert values.grad[~MASK].tolist() == [0.0] * 4
    assert bool((values.grad[MASK] > 0).all())


def test_denominators_count_only_samples_with_tokens():
    assert Denominators.of(MASK) == Denominators(num_tokens=5, num_sequences=2)
    assert Denominators.of(torch.zeros(2, 3, dtype=torch.bool)) == Denominators(0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_aggregate_of_nothing_is_zero(mode):
    mask = torch.zeros_like(MASK)
    assert float(aggregate(VALUES, mask, Denominators.of(mask), mode, 8)) == 0.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 6), width=st.integers(1, 8), mode=st.sampled_from(MODES))
def test_aggregate_equals_the_reference_with_sample_weights(seed, batch, width, mode):
    case = random_case(seed, batch, width)
    weights = case.old[:, 0].abs()
    ours = aggregate(case.advantages, case.mask, Denominators.of(case.mask), mode, 11, weights)
    theirs = reference.aggregated(case.advantages.tolist(), case.mask.tolist(), mode, 11, weights.tolist())
    assert float(ours) == pytest.approx(theirs, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_aggregate_shares_of_micro_batches_add_up(mode):
    case = random_case(3, batch=8, width=6)
    denominators = Denominators.of(case.mask)
    whole = aggregate(case.advantages, case.mask, denominators, mode, 6)
    for size in (1, 3, 5):
        parts = zip(case.advantages.split(size), case.mask.split(size), strict=True)
        shares = sum(float(aggregate(v, m, denominators, mode, 6)) for v, m in parts)
        assert shares == pytest.approx(float(whole), rel=1e-9)
