import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import policy_reference
from reference.gspo_cases import random_case

from roll_gspo.algorithms.ratio import clamped_log_ratio
from roll_gspo.declarations import RATIOS

LEVELS = sorted(RATIOS)
MASK = torch.tensor([[True, True, False], [True, True, True]])
LOG_PROBS = torch.tensor([[-1.0, -2.0, -7.0], [-0.5, -1.5, -1.0]])
OLD = torch.tensor([[-1.2, -1.6, -1.0], [-0.5, -1.2, -1.6]])


def ratio_of(log_probs, old, mask, level):
    return RATIOS.load(level)(clamped_log_ratio(log_probs, old, mask), mask)


def test_ratio_token_hand_computed():
    ratio = ratio_of(LOG_PROBS, OLD, MASK, "token")
    expected = [[math.exp(0.2), math.exp(-0.4), 1.0], [1.0, math.exp(-0.3), math.exp(0.6)]]
    torch.testing.assert_close(ratio, torch.tensor(expected))


@pytest.mark.parametrize("level", ["seq", "seq_token"])
def test_ratio_sequence_hand_computed(level):
    ratio = ratio_of(LOG_PROBS, OLD, MASK, level)
    first, second = math.exp((0.2 - 0.4) / 2), math.exp((0 - 0.3 + 0.6) / 3)
    torch.testing.assert_close(ratio, torch.tensor([[first, first, 1.0], [second] * 3]))


def reference_ratios(case, level):
    rows = zip(case.log_probs.tolist(), case.old.tolist(), case.mask.tolist(), strict=True)
    table = []
    for new, old, mask in rows:
        d = [policy_reference.log_ratio(n, o)[0] if m else 0.0 for n, o, m in zip(new, old, mask, strict=True)]
        table.append(policy_reference.ratio_and_derivative(d, [1.0] * len(d), mask, level)[0])
    return torch.tensor(table, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 6),
    width=st.integers(1, 9),
    spread=st.sampled_from([0.0, 1e-3, 0.5, 15.0]),
    level=st.sampled_from(LEVELS),
    gaps=st.booleans(),
)
def test_ratio_equals_the_reference(seed, batch, width, spread, level, gaps):
    case = random_case(seed, batch, width, spread, gaps=gaps)
    ours = ratio_of(case.log_probs, case.old, case.mask, level)
    torch.testing.assert_close(ours, reference_ratios(case, level), rtol=1e-6, atol=1e-9)


SEGMENTS = torch.tensor([[True, True, False, True, False, True], [False, True, True, True, False, False]])


def test_ratio_segment_hand_computed():
    # Runs of row 0 at both borders: d = (0.2, -0.4), (0.3), (-0.1); one run in the middle of row 1: (0.1, 0.2, 0.6).
    d = torch.tensor([[0.2, -0.4, 9.0, 0.3, 9.0, -0.1], [9.0, 0.1, 0.2, 0.6, 9.0, 9.0]], requires_grad=True)
    ratio = ratio_of(d, torch.zeros_like(d), SEGMENTS, "segment")
    first, single, last, middle = math.exp(-0.1), math.exp(0.3), math.exp(-0.1), math.exp(0.3)
    expected = [[first, first, 1.0, single, 1.0, last], [1.0, middle, middle, middle, 1.0, 1.0]]
    torch.testing.assert_close(ratio, torch.tensor(expected))
    # A function of one token reaches the tokens of its run, a share each, and no other run.
    gradient = torch.autograd.grad(ratio[0, 0] + 5 * ratio[1, 2], d)[0]
    expected = [[first / 2, first / 2, 0, 0, 0, 0], [0, *[5 * middle / 3] * 3, 0, 0]]
    torch.testing.assert_close(gradient, torch.tensor(expected))


def test_ratio_segment_equals_seq_for_one_run():
    case = random_case(4, batch=6, width=8, spread=0.4)
    case.mask[2] = torch.tensor([False, False, True, True, True, False, False, False])
    results = []
    for level in ("seq", "segment"):
        log_probs = case.log_probs.clone().requires_grad_()
        ratio = ratio_of(log_probs, case.old, case.mask, level)
        results.append((ratio.detach(), torch.autograd.grad((ratio * case.advantages)[case.mask].sum(), log_probs)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_ratio_segment_runs_end_with_the_row():
    # The last token of one row and the first of the next are neighbours in memory, not in a response.
    d = torch.tensor([[0.0, 0.4], [0.8, 0.0]])
    mask = torch.tensor([[False, True], [True, False]])
    ratio = ratio_of(d, torch.zeros(2, 2), mask, "segment")
    torch.testing.assert_close(ratio, torch.tensor([[1.0, math.exp(0.4)], [math.exp(0.8), 1.0]]))


# Two turns of an episode, of 2 and 3 tokens, around a given token: d = (0.2, -0.4) and (0.3, 0.1, -0.1).
TWO_TURNS = torch.tensor([[True, True, False, True, True, True]])
OF_TWO_TURNS = torch.tensor([[0.2, -0.4, 9.0, 0.3, 0.1, -0.1]], dtype=torch.float64)
EPISODE, FIRST, SECOND = math.exp(0.1 / 5), math.exp(-0.2 / 2), math.exp(0.3 / 3)


@pytest.mark.parametrize(
    ("level", "ratio", "shares"),
    [
        ("token", [math.exp(x) for x in (0.2, -0.4, 0.0, 0.3, 0.1, -0.1)], None),
        ("seq", [EPISODE, EPISODE, 1.0, *[EPISODE] * 3], [EPISODE / 5] * 5),
        ("segment", [FIRST, FIRST, 1.0, *[SECOND] * 3], [FIRST / 2] * 2 + [SECOND / 3] * 3),
        ("seq_token", [EPISODE, EPISODE, 1.0, *[EPISODE] * 3], None),
    ],
)
def test_ratio_of_an_episode_of_two_turns_hand_computed(level, ratio, shares):
    d = OF_TWO_TURNS.clone().requires_grad_()
    found = ratio_of(d, torch.zeros_like(d), TWO_TURNS, level)
    torch.testing.assert_close(found, torch.tensor([ratio], dtype=torch.float64))
    # Weights 1, 2, 4, 8, 16 on the tokens: a token of `token` and `seq_token` gets its own weight, of `segment` the sum
    # over its turn, and of `seq` the sum over the episode.
    weights = torch.tensor([1.0, 2.0, 0.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    gradient = torch.autograd.grad((found[0] * weights).sum(), d)[0][0]
    if shares is None:
        expected = [w * r for w, r in zip(weights.tolist(), ratio, strict=True)]
    else:
        sums = {"seq": [31.0] * 5, "segment": [3.0, 3.0, 28.0, 28.0, 28.0]}[level]
        of_tokens = [a * b for a, b in zip(sums, shares, strict=True)]
        expected = [*of_tokens[:2], 0.0, *of_tokens[2:]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))
    single = OF_TWO_TURNS.float().requires_grad_()
    weighted = ratio_of(single, torch.zeros_like(single), TWO_TURNS, level)[0] * weights.float()
    torch.testing.assert_close(torch.autograd.grad(weighted.sum(), single)[0][0].double(), gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_of_an_empty_sample_is_one_without_gradient(level):
    log_probs = torch.full((2, 3), math.nan, requires_grad=True)
    mask = torch.tensor([[False] * 3, [False] * 3])
    ratio = ratio_of(log_probs, torch.full((2, 3), -math.inf), mask, level)
    ratio.sum().backward()
    assert torch.equal(ratio, torch.ones(2, 3))
    assert torch.equal(log_probs.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_ratio_masked_garbage_reaches_neither_value_nor_gradient(level, garbage):
    clean = LOG_PROBS.clone().requires_grad_()
    dirty = torch.where(MASK, LOG_PROBS, garbage).requires_grad_()
    expected = ratio_of(clean, OLD, MASK, level)
    ratio = ratio_of(dirty, torch.where(MASK, OLD, garbage), MASK, level)
    expected.square().sum().backward()
    ratio.square().sum().backward()
    assert torch.equal(ratio, expected)
    assert torch.equal(dirty.grad, clean.grad)
    assert dirty.grad[0, 2] == 0


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_nan_of_a_valid_token_is_not_hidden(level):
    log_probs = LOG_PROBS.clone()
    log_probs[0, 1] = math.nan
    assert bool(ratio_of(log_probs, OLD, MASK, level)[0, 1].isnan())


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_is_finite_beyond_the_clamp(level):
    log_probs = torch.tensor([[0.0, -500.0, -1.0]], requires_grad=True)
    ratio = ratio_of(log_probs, torch.tensor([[-300.0, 0.0, -1.5]]), MASK[1:], level)
    ratio.sum().backward()
    assert bool(ratio.isfinite().all())
    assert float(ratio.detach().max()) <= math.exp(20) * 1.0001
    assert log_probs.grad[0, :2].tolist() == [0.0, 0.0]
    assert float(log_probs.grad[0, 2]) > 0


def test_ratio_levels_agree_on_a_single_token():
    log_probs, old, mask = LOG_PROBS[:, :1], OLD[:, :1], MASK[:, :1]
    ratios = [ratio_of(log_probs, old, mask, level) for level in LEVELS]
    for ratio in ratios[1:]:
        assert torch.equal(ratio, ratios[0])


@pytest.mark.parametrize("level", LEVELS)
def test_ratio_bf16_is_computed_in_float32(level):
    low, old = LOG_PROBS.bfloat16(), OLD.bfloat16()
    ratio = ratio_of(low, old, MASK, level)
    assert ratio.dtype == torch.float32
    assert torch.equal(ratio, ratio_of(low.float(), old.float(), MASK, level))
