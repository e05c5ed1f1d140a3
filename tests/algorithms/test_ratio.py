import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gspo_reference as reference
from reference.gspo_cases import random_case

from roll_gspo.algorithms.ratio import RATIOS, importance_ratio

LEVELS = sorted(RATIOS)
MASK = torch.tensor([[True, True, False], [True, True, True]])
LOG_PROBS = torch.tensor([[-1.0, -2.0, -7.0], [-0.5, -1.5, -1.0]])
OLD = torch.tensor([[-1.2, -1.6, -1.0], [-0.5, -1.2, -1.6]])


def test_ratio_token_hand_computed():
    ratio = importance_ratio(LOG_PROBS, OLD, MASK, "token")
    expected = [[math.exp(0.2), math.exp(-0.4), 1.0], [1.0, math.exp(-0.3), math.exp(0.6)]]
    torch.testing.assert_close(ratio, torch.tensor(expected))


@pytest.mark.parametrize("level", ["seq", "seq_token"])
def test_ratio_sequence_hand_computed(level):
    ratio = importance_ratio(LOG_PROBS, OLD, MASK, level)
    first, second = math.exp((0.2 - 0.4) / 2), math.exp((0 - 0.3 + 0.6) / 3)
    torch.testing.assert_close(ratio, torch.tensor([[first, first, 1.0], [second] * 3]))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 6),
    width=st.integers(1, 9),
    spread=st.sampled_from([0.0, 1e-3, 0.5, 15.0]),
    level=st.sampled_from(LEVELS),
)
def test_ratio_equals_the_reference(seed, batch, width, spread, level):
    case = random_case(seed, batch, width, spread)
    ours = importance_ratio(case.log_probs, case.old, case.mask, level)
    theirs = reference.ratios(case.log_probs.tolist(), case.old.tolist(), case.mask.tolist(), level)
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_of_an_empty_sample_is_one_without_gradient(level):
    log_probs = torch.full((2, 3), math.nan, requires_grad=True)
    mask = torch.tensor([[False] * 3, [False] * 3])
    ratio = importance_ratio(log_probs, torch.full((2, 3), -math.inf), mask, level)
    ratio.sum().backward()
    assert torch.equal(ratio, torch.ones(2, 3))
    assert torch.equal(log_probs.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_ratio_masked_garbage_reaches_neither_value_nor_gradient(level, garbage):
    clean = LOG_PROBS.clone().requires_grad_()
    dirty = torch.where(MASK, LOG_PROBS, garbage).requires_grad_()
    expected = importance_ratio(clean, OLD, MASK, level)
    ratio = importance_ratio(dirty, torch.where(MASK, OLD, garbage), MASK, level)
    expected.square().sum().backward()
    ratio.square().sum().backward()
    assert torch.equal(ratio, expected)
    assert torch.equal(dirty.grad, clean.grad)
    assert dirty.grad[0, 2] == 0


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_is_finite_beyond_the_clamp(level):
    log_probs = torch.tensor([[0.0, -500.0, -1.0]], requires_grad=True)
    ratio = importance_ratio(log_probs, torch.tensor([[-300.0, 0.0, -1.5]]), MASK[1:], level)
    ratio.sum().backward()
    assert bool(ratio.isfinite().all())
    assert float(ratio.detach().max()) <= math.exp(20) * 1.0001
    assert log_probs.grad[0, :2].tolist() == [0.0, 0.0]
    assert float(log_probs.grad[0, 2]) > 0


def test_ratio_levels_agree_on_a_single_token():
    log_probs, old, mask = LOG_PROBS[:, :1], OLD[:, :1], MASK[:, :1]
    ratios = [importance_ratio(log_probs, old, mask, level) for level in LEVELS]
    assert torch.equal(ratios[0], ratios[1])
    assert torch.equal(ratios[1], ratios[2])


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_bf16_is_computed_in_float32(level):
    low, old = LOG_PROBS.bfloat16(), OLD.bfloat16()
    ratio = importance_ratio(low, old, MASK, level)
    assert ratio.dtype == torch.float32
    assert torch.equal(ratio, importance_ratio(low.float(), old.float(), MASK, level))


def test_ratio_unknown_level_names_the_known_ones():
    with pytest.raises(ValueError, match="importance_sampling: unknown value 'sequence'; use one of seq, "):
        importance_ratio(LOG_PROBS, OLD, MASK, "sequence")
