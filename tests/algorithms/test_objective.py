import math

import pytest
import torch

from roll_gspo.algorithms.objective import (
    POLICY_LOSSES,
    Terms,
    cispo,
    clip,
    clipped_objective,
    dual_clip,
    gmpo,
    sapo,
    topr,
)


def test_clipped_objective_hand_computed():
    # inside; above, A > 0 (clipped); above, A < 0 (kept); below, A > 0 (kept); below, A < 0 (clipped)
    ratio = torch.tensor([[1.1, 1.5, 1.5, 0.5, 0.5]])
    advantages = torch.tensor([[2.0, 2.0, -2.0, 2.0, -2.0]])
    loss, clipped = clipped_objective(ratio, advantages, 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([[-2.2, -2.6, 3.0, -1.0, 1.6]]))
    assert clipped.tolist() == [[False, True, False, False, True]]


def test_clipped_objective_clipped_is_where_the_gradient_is_zero():
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


def test_clipped_objective_gspo_range_fires_where_the_token_range_does_not():
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


def terms_of(log_ratio, advantages, log_probs=-1.0, **choices) -> Terms:
    """One response, its log-ratios the leaf that the gradient is taken by; `ratio` at the level of a token."""
    d = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    log_probs = torch.full_like(d, log_probs).detach() + (d - d.detach())
    lengths = torch.tensor([len(log_ratio)])
    return Terms(log_probs, d, d.exp(), torch.tensor([advantages], dtype=torch.float64), lengths, **choices)


def evaluated(policy_loss, terms):
    loss, clipped = policy_loss(terms)
    gradient = torch.autograd.grad(loss.sum(), terms.log_ratio)[0]
    return loss.detach(), gradient, clipped[0].tolist()


def row(*values) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_clip_is_the_clipped_objective_of_the_ratio():
    terms = terms_of([0.1, 0.5], [1.0, 1.0], clip_low=0.2, clip_high=0.3)
    loss, gradient, clipped = evaluated(clip, terms)
    torch.testing.assert_close(loss, row(-math.exp(0.1), -1.3))
    torch.testing.assert_close(gradient, row(-math.exp(0.1), 0.0))
    assert clipped == [False, True]


def test_cispo_hand_computed():
    # The weight is bounded whatever the sign of A, and every token keeps -weight A as its gradient.
    ratios, advantages = [1.1, 2.0, 2.0, 0.5, 0.5, 2.0], [2.0, 2.0, -2.0, 2.0, -2.0, 0.0]
    terms = terms_of([math.log(r) for r in ratios], advantages, log_probs=-0.5, clip_low=0.2, clip_high=0.3)
    loss, gradient, clipped = evaluated(cispo, terms)
    expected = row(-1.1 * 2, -1.3 * 2, 1.3 * 2, -0.8 * 2, 0.8 * 2, 0.0)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss, -0.5 * expected)
    assert clipped == [False, True, True, True, True, False]


def test_cispo_without_a_lower_bound_keeps_small_weights():
    terms = terms_of([-3.0], [1.0], clip_low=1.0, clip_high=4.0)
    _, gradient, clipped = evaluated(cispo, terms)
    torch.testing.assert_close(gradient, row(-math.exp(-3)))
    assert clipped == [False]


def test_gmpo_hand_computed():
    # A > 0: d = 0.6 is held at log 1.5, d = -2 is not. The mean of the three exponents is the sequence's.
    terms = terms_of([0.6, -2.0, 0.3], [2.0] * 3, clip_low=0.2, clip_high=0.5)
    loss, gradient, clipped = evaluated(gmpo, terms)
    mean = math.exp((math.log(1.5) - 2.0 + 0.3) / 3)
    torch.testing.assert_close(loss, row(*[-2 * mean] * 3))
    torch.testing.assert_close(gradient, row(0.0, -2 * mean, -2 * mean))  # 3 tokens of loss, a third each
    assert clipped == [True, False, False]


def test_gmpo_negative_advantage_is_held_from_below():
    terms = terms_of([0.6, -2.0, 0.3], [-2.0] * 3, clip_low=0.2, clip_high=0.5)
    loss, gradient, clipped = evaluated(gmpo, terms)
    mean = math.exp((0.6 + math.log(0.8) + 0.3) / 3)
    torch.testing.assert_close(loss, row(*[2 * mean] * 3))
    torch.testing.assert_close(gradient, row(2 * mean, 0.0, 2 * mean))
    assert clipped == [False, True, False]


def test_gmpo_without_a_lower_bound():
    loss, _, clipped = evaluated(gmpo, terms_of([-9.0], [-1.0], clip_low=1.0, clip_high=0.5))
    torch.testing.assert_close(loss, row(math.exp(-9)))
    assert clipped == [False]


def test_gmpo_on_policy_is_the_policy_gradient():
    terms = terms_of([0.0] * 4, [1.5] * 4, clip_low=0.3, clip_high=0.5)
    loss, gradient, clipped = evaluated(gmpo, terms)
    torch.testing.assert_close(loss, row(*[-1.5] * 4))
    torch.testing.assert_close(gradient, row(*[-1.5] * 4))
    assert clipped == [False] * 4


def test_sapo_hand_computed():
    # The gradient by the ratio is -4 p (1 - p) A with p = sigmoid(tau (r - 1)): 1 at r = 1 for every tau.
    r = 1.5
    terms = terms_of([math.log(r), math.log(r), 0.0], [2.0, -2.0, -2.0], sapo_tau_positive=1.0, sapo_tau_negative=3.0)
    loss, gradient, clipped = evaluated(sapo, terms)
    p, n = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1.5))
    torch.testing.assert_close(loss, row(-4 * p * 2, 4 / 3 * n * 2, 4 / 3 * 0.5 * 2))
    torch.testing.assert_close(gradient, row(-4 * p * (1 - p) * 2 * r, 4 * n * (1 - n) * 2 * r, 2.0))
    assert clipped == [False] * 3


def test_sapo_temperatures_keep_the_precision_of_float64():
    loss, _, _ = evaluated(sapo, terms_of([0.0], [-1.0], sapo_tau_negative=1.3))
    assert float(loss) == pytest.approx(2 / 1.3, rel=1e-14)


@pytest.mark.parametrize(
    ("log_ratio", "advantages", "weights", "clipped"),
    [
        ([0.5, -1.0], [1.0, 1.0], [1.0, 1.0], [False, False]),  # a right answer: no ratio
        ([0.5, -1.0], [-1.0, -1.0], [math.exp(-0.5)] * 2, [False, False]),  # a wrong one left behind: tapered
        ([0.5, 1.0], [-1.0, -1.0], [1.0, 1.0], [True, True]),  # a wrong one more likely than before: at most 1
        ([0.5, -1.0], [-1.0, 2.0], [math.exp(-0.5), 1.0], [False, False]),
        ([0.5, 1.0], [0.0, 0.0], [1.0, 1.0], [False, False]),
        ([-19.0, -19.0], [-1.0, -1.0], [math.exp(-20)] * 2, [False, False]),  # the clamp of the exponent
    ],
)
def test_topr_hand_computed(log_ratio, advantages, weights, clipped):
    loss, gradient, counted = evaluated(topr, terms_of(log_ratio, advantages, log_probs=-0.5))
    expected = row(*[-w * a for w, a in zip(weights, advantages, strict=True)])
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss, -0.5 * expected)
    assert counted == clipped


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses_leave_no_gradient_without_advantage(name):
    terms = terms_of([0.5, -3.0, 0.0], [0.0] * 3, clip_low=0.2, clip_high=0.2)
    loss, gradient, clipped = evaluated(POLICY_LOSSES[name], terms)
    assert (float(loss.abs().sum()), float(gradient.abs().sum())) == (0.0, 0.0)
    assert clipped == [False] * 3
