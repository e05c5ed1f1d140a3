import math
from dataclasses import replace

import pytest
import torch

from roll_gspo.algorithms.objective import (
    PolicyLossSettings,
    Terms,
    cispo,
    clip,
    clipped_objective,
    dual_clip,
    gmpo,
    sapo,
    topr,
)
from roll_gspo.declarations import POLICY_LOSSES

ON_TOKENS = PolicyLossSettings("token", None, None, None, "token-mean", response_length=8)


def test_clipped_objective_hand_computed():
    # inside the range; above, A > 0 (clipped); above, A < 0 (kept); below, A > 0 (kept); below, A < 0 (clipped)
    ratio = torch.tensor([[1.1, 1.5, 1.5, 0.5, 0.5]])
    advantages = torch.tensor([[2.0, 2.0, -2.0, 2.0, -2.0]])
    loss, clipped = clipped_objective(ratio, advantages, 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([[-2.2, -2.6, 3.0, -1.0, 1.6]]))
    assert clipped.tolist() == [[False, True, False, False, True]]


def test_clipped_objective_clips_where_the_gradient_is_zero():
    ratio = torch.linspace(0.5, 1.6, 23)[None].repeat(2, 1).requires_grad_()
    advantages = torch.tensor([[1.5], [-0.5]]).expand(2, 23)
    loss, clipped = clipped_objective(ratio, advantages, 0.2, 0.27)
    loss.sum().backward()
    assert torch.equal(ratio.grad == 0, clipped)
    torch.testing.assert_close(ratio.grad[~clipped], -advantages[~clipped])


def test_clipped_objective_zero_advantage_is_never_clipped():
    loss, clipped = clipped_objective(torch.tensor([[0.1, 9.0]]), torch.zeros(1, 2), 0.2, 0.2)
    assert not bool(clipped.any())
    assert float(loss.abs().sum()) == 0


def test_clipped_objective_gspo_range_clips_what_the_token_range_does_not():
    ratio, advantages = torch.tensor([[1.0005, 0.9995]]), torch.tensor([[1.0, -1.0]])
    assert clipped_objective(ratio, advantages, 3e-4, 4e-4)[1].tolist() == [[True, True]]
    assert clipped_objective(ratio, advantages, 0.2, 0.27)[1].tolist() == [[False, False]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "bounded"),
    [(2.0, -3.0, 4.2, True), (1.3, -3.0, 3.9, False), (2.0, 3.0, -3.6, False)],
)
def test_dual_clip_bounds_only_negative_advantages(ratio, advantage, expected, bounded):
    rho = torch.tensor([[ratio]], requires_grad=True)
    advantages = torch.tensor([[advantage]])
    loss, _ = clipped_objective(rho, advantages, 0.2, 0.2)
    loss, where = dual_clip(loss, advantages, 1.4)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(expected)
    assert bool(where) is bounded
    if bounded:
        assert float(rho.grad) == 0


def inputs_of(log_ratio, advantages, log_probs=-1.0, **changes) -> tuple[Terms, PolicyLossSettings]:
    """Inputs of a policy loss for one response; the log-ratios are the leaf, and `ratio` is that of the tokens."""
    d = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    log_probs = torch.full_like(d, log_probs).detach() + (d - d.detach())
    mask, lengths = torch.ones_like(d, dtype=torch.bool), torch.tensor([len(log_ratio)])
    terms = Terms(log_probs, d, d.exp(), torch.tensor([advantages], dtype=torch.float64), mask, lengths)
    return terms, replace(ON_TOKENS, **changes)


def evaluated(policy_loss, inputs):
    loss, clipped = policy_loss(*inputs)
    gradient = torch.autograd.grad(loss.sum(), inputs[0].log_ratio)[0]
    return loss.detach(), gradient, clipped[0].tolist()


def row(*values) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_clip_equals_the_clipped_objective():
    inputs = inputs_of([0.1, 0.5], [1.0, 1.0], clip_low=0.2, clip_high=0.3)
    loss, gradient, clipped = evaluated(clip, inputs)
    torch.testing.assert_close(loss, row(-math.exp(0.1), -1.3))
    torch.testing.assert_close(gradient, row(-math.exp(0.1), 0.0))
    assert clipped == [False, True]


def test_cispo_hand_computed():
    # The weight is bounded for every sign of A, and every token has the gradient -weight A.
    ratios, advantages = [1.1, 2.0, 2.0, 0.5, 0.5, 2.0], [2.0, 2.0, -2.0, 2.0, -2.0, 0.0]
    inputs = inputs_of([math.log(r) for r in ratios], advantages, log_probs=-0.5, clip_low=0.2, clip_high=0.3)
    loss, gradient, clipped = evaluated(cispo, inputs)
    expected = row(-1.1 * 2, -1.3 * 2, 1.3 * 2, -0.8 * 2, 0.8 * 2, 0.0)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss, -0.5 * expected)
    assert clipped == [False, True, True, True, True, False]


def test_cispo_without_a_lower_bound_keeps_small_weights():
    inputs = inputs_of([-3.0], [1.0], clip_low=1.0, clip_high=4.0)
    _, gradient, clipped = evaluated(cispo, inputs)
    torch.testing.assert_close(gradient, row(-math.exp(-3)))
    assert clipped == [False]


def test_gmpo_hand_computed():
    # A > 0: d = 0.6 is clipped to log 1.5, d = -2 is not. The ratio is the mean of the three exponents.
    inputs = inputs_of([0.6, -2.0, 0.3], [2.0] * 3, clip_low=0.2, clip_high=0.5)
    loss, gradient, clipped = evaluated(gmpo, inputs)
    mean = math.exp((math.log(1.5) - 2.0 + 0.3) / 3)
    torch.testing.assert_close(loss, row(*[-2 * mean] * 3))
    torch.testing.assert_close(gradient, row(0.0, -2 * mean, -2 * mean))  # 3 tokens of loss, a third each
    assert clipped == [True, False, False]


def test_gmpo_negative_advantage_is_clipped_from_below():
    inputs = inputs_of([0.6, -2.0, 0.3], [-2.0] * 3, clip_low=0.2, clip_high=0.5)
    loss, gradient, clipped = evaluated(gmpo, inputs)
    mean = math.exp((0.6 + math.log(0.8) + 0.3) / 3)
    torch.testing.assert_close(loss, row(*[2 * mean] * 3))
    torch.testing.assert_close(gradient, row(2 * mean, 0.0, 2 * mean))
    assert clipped == [False, True, False]


def test_gmpo_without_a_lower_bound():
    loss, _, clipped = evaluated(gmpo, inputs_of([-9.0], [-1.0], clip_low=1.0, clip_high=0.5))
    torch.testing.assert_close(loss, row(math.exp(-9)))
    assert clipped == [False]


def test_gmpo_on_policy_is_the_policy_gradient():
    inputs = inputs_of([0.0] * 4, [1.5] * 4, clip_low=0.3, clip_high=0.5)
    loss, gradient, clipped = evaluated(gmpo, inputs)
    torch.testing.assert_close(loss, row(*[-1.5] * 4))
    torch.testing.assert_close(gradient, row(*[-1.5] * 4))
    assert clipped == [False] * 4


def test_sapo_hand_computed():
    # The gradient with respect to the ratio is -4 p (1 - p) A with p = sigmoid(tau (r - 1)): 1 at r = 1 for every tau.
    r = 1.5
    inputs = inputs_of([math.log(r), math.log(r), 0.0], [2.0, -2.0, -2.0], sapo_tau_positive=1.0, sapo_tau_negative=3.0)
    loss, gradient, clipped = evaluated(sapo, inputs)
    p, n = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1.5))
    torch.testing.assert_close(loss, row(-4 * p * 2, 4 / 3 * n * 2, 4 / 3 * 0.5 * 2))
    torch.testing.assert_close(gradient, row(-4 * p * (1 - p) * 2 * r, 4 * n * (1 - n) * 2 * r, 2.0))
    assert clipped == [False] * 3


def test_sapo_temperatures_keep_the_precision_of_float64():
    loss, _, _ = evaluated(sapo, inputs_of([0.0], [-1.0], sapo_tau_negative=1.3))
    assert float(loss) == pytest.approx(2 / 1.3, rel=1e-14)


@pytest.mark.parametrize(
    ("log_ratio", "advantages", "weights", "clipped"),
    [
        ([0.5, -1.0], [1.0, 1.0], [1.0, 1.0], [False, False]),  # a right answer: weight 1
        (
            [0.5, -1.0],
            [-1.0, -1.0],
            [math.exp(-0.5)] * 2,
            [False, False],
        ),  # a wrong answer that is less likely
        ([0.5, 1.0], [-1.0, -1.0], [1.0, 1.0], [True, True]),  # a wrong answer that is more likely: at most 1
        ([0.5, -1.0], [-1.0, 2.0], [math.exp(-0.5), 1.0], [False, False]),
        ([0.5, 1.0], [0.0, 0.0], [1.0, 1.0], [False, False]),
        ([-19.0, -19.0], [-1.0, -1.0], [math.exp(-20)] * 2, [False, False]),  # the clamp of the exponent
    ],
)
def test_topr_hand_computed(log_ratio, advantages, weights, clipped):
    loss, gradient, counted = evaluated(topr, inputs_of(log_ratio, advantages, log_probs=-0.5))
    expected = row(*[-w * a for w, a in zip(weights, advantages, strict=True)])
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss, -0.5 * expected)
    assert counted == clipped


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_loss_without_advantage_has_no_gradient(name):
    inputs = inputs_of([0.5, -3.0, 0.0], [0.0] * 3, clip_low=0.2, clip_high=0.2)
    loss, gradient, clipped = evaluated(POLICY_LOSSES.load(name), inputs)
    assert (float(loss.abs().sum()), float(gradient.abs().sum())) == (0.0, 0.0)
    assert clipped == [False] * 3
