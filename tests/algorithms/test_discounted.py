import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import advantage_reference as reference

from roll_gspo.algorithms import discounted
from roll_gspo.algorithms.discounted import BLOCK

DISCOUNTS = [1.0, 1 - 1e-7, 0.999, 0.95, 0.5, 0.2, 1e-3, 0.0]


def discounted_returns(rewards, mask, gamma):
    """Zero rewards and results where masked, like the callers."""
    return torch.where(mask, discounted.discounted_returns(torch.where(mask, rewards, 0.0), mask, gamma), 0.0)


def generalised_advantages(rewards, values, mask, gamma, lambd):
    """The same; values may be anything where masked."""
    rewards = torch.where(mask, rewards, 0.0)
    return torch.where(mask, discounted.generalised_advantages(rewards, values, mask, gamma, lambd), 0.0)


def plain_loop(rewards, values, mask, gamma, lambd):
    """Backwards over the tokens in float64; with values of 0 and lambd 1 the reward-to-go."""
    rewards, values = rewards.double(), values.double()
    result = torch.zeros_like(rewards)
    following, after = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        valid = mask[:, t]
        estimate = rewards[:, t] + gamma * after - values[:, t] + gamma * lambd * following
        following, after = torch.where(valid, estimate, following), torch.where(valid, values[:, t], after)
        result[:, t] = torch.where(valid, estimate, 0.0)
    return result


def table(width, holes, seed=0, batch=4):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, batch, width, generator=generator)
    if holes:
        mask = torch.rand(batch, width, generator=generator) < 0.8
        mask[1] = False
        return rewards, values, mask
    lengths = torch.tensor([width, 0, max(width // 2, 1), 1])
    return rewards, values, torch.arange(width) < lengths[:, None]


def test_discounted_returns_hand_computed():
    rewards = torch.tensor([[1.0, math.nan, 2.0, 4.0], [8.0, 8.0, 8.0, math.inf]])
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    returns = discounted_returns(rewards, mask, 0.5)
    assert returns.tolist() == [[3.0, 0.0, 4.0, 4.0], [12.0, 8.0, 0.0, 0.0]]
    assert discounted_returns(rewards, mask, 1.0).tolist() == [[7.0, 0.0, 6.0, 4.0], [16.0, 8.0, 0.0, 0.0]]
    assert discounted_returns(rewards, mask, 0.0).tolist() == [[1.0, 0.0, 2.0, 4.0], [8.0, 8.0, 0.0, 0.0]]


def test_generalised_advantages_hand_computed():
    rewards = torch.tensor([[0.0, math.nan, 0.0, 3.0]])
    values = torch.tensor([[1.0, math.inf, 2.0, 4.0]])
    mask = torch.tensor([[True, False, True, True]])
    # deltas 0 + 2 - 1 = 1, 0 + 4 - 2 = 2, 3 + 0 - 4 = -1
    assert generalised_advantages(rewards, values, mask, 1.0, 0.5).tolist() == [[1.75, 0.0, 1.5, -1.0]]
    assert generalised_advantages(rewards, values, mask, 1.0, 0.0).tolist() == [[1.0, 0.0, 2.0, -1.0]]
    assert generalised_advantages(rewards, values, mask, 1.0, 1.0).tolist() == [[2.0, 0.0, 1.0, -1.0]]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("discount", DISCOUNTS)
@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK * BLOCK, 4096, BLOCK * 150 + 7])
def test_discounted_returns_equal_the_plain_loop(width, discount, holes):
    rewards, _, mask = table(width, holes)
    expected = plain_loop(rewards, torch.zeros_like(rewards), mask, discount, 1.0)
    scale = max(float(expected.abs().max()), 1.0)
    exact = discounted_returns(rewards.double(), mask, discount)
    torch.testing.assert_close(exact / scale, expected / scale, rtol=0, atol=1e-12)
    single = discounted_returns(rewards, mask, discount)
    torch.testing.assert_close(single.double() / scale, expected / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("gamma", "lambd"), [(1.0, 1.0), (1.0, 0.95), (0.99, 1.0), (0.999, 0.999), (0.5, 0.3)])
def test_generalised_advantages_equal_the_plain_loop(gamma, lambd, holes):
    rewards, values, mask = table(4096, holes)
    expected = plain_loop(rewards, values, mask, gamma, lambd)
    scale = max(float(expected.abs().max()), 1.0)
    exact = generalised_advantages(rewards.double(), values.double(), mask, gamma, lambd)
    torch.testing.assert_close(exact / scale, expected / scale, rtol=0, atol=1e-12)
    single = generalised_advantages(rewards, values, mask, gamma, lambd)
    torch.testing.assert_close(single.double() / scale, expected / scale, rtol=0, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 80),
    holes=st.booleans(),
    gamma=st.floats(0, 1),
    lambd=st.floats(0, 1),
)
def test_discounted_equals_the_definition(seed, width, holes, gamma, lambd):
    rewards, values, mask = (x.double() if x.is_floating_point() else x for x in table(width, holes, seed))
    returns = discounted_returns(rewards, mask, gamma)
    estimates = generalised_advantages(rewards, values, mask, gamma, lambd)
    for i, row in enumerate(mask.tolist()):
        steps = reference.times(row)
        r, v = rewards[i, steps].tolist(), values[i, steps].tolist()
        expected = reference.placed(reference.rewards_to_go(r, gamma), row)
        torch.testing.assert_close(returns[i], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        expected = reference.placed(reference.gae(r, v, gamma, lambd), row)
        torch.testing.assert_close(estimates[i], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_discounted_long_horizon_neither_overflows_nor_drifts():
    # A reward at the end of 4096 tokens: gamma^(4095 - t), to float32's own precision at every t.
    rewards = torch.zeros(1, 4096)
    rewards[0, -1] = 1.0
    mask = torch.ones(1, 4096, dtype=torch.bool)
    for gamma in (0.9999, 0.99, 0.9):
        exact = torch.pow(torch.tensor(gamma, dtype=torch.float64), torch.arange(4095, -1, -1))
        returns = discounted_returns(rewards, mask, gamma)[0].double()
        torch.testing.assert_close(returns, exact, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_discounted_does_not_depend_on_padding_or_order(gamma):
    rewards, values, mask = table(70, True)
    padded = [torch.nn.functional.pad(x, (0, 37)) for x in (rewards, values, mask)]
    order = torch.tensor([2, 0, 3, 1])
    for function, arguments, wide in (
        (lambda r, v, m: discounted_returns(r, m, gamma), (rewards, values, mask), padded),
        (lambda r, v, m: generalised_advantages(r, v, m, gamma, 0.9), (rewards, values, mask), padded),
    ):
        narrow = function(*arguments)
        torch.testing.assert_close(function(*wide)[:, :70], narrow, rtol=0, atol=1e-5)
        torch.testing.assert_close(function(*(x[order] for x in arguments)), narrow[order], rtol=0, atol=1e-5)


def test_discounted_of_half_precision_is_float32():
    rewards, values, mask = table(50, True)
    half = generalised_advantages(rewards.bfloat16(), values.bfloat16(), mask, 0.9, 0.9)
    assert half.dtype == torch.float32
    single = generalised_advantages(rewards.bfloat16().float(), values.bfloat16().float(), mask, 0.9, 0.9)
    assert torch.equal(half, single)


def test_discounted_of_nothing():
    empty = torch.zeros(3, 0)
    assert discounted_returns(empty, empty.bool(), 0.9).shape == (3, 0)
    assert generalised_advantages(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 4).bool(), 0.9, 0.9).shape == (
        0,
        4,
    )
