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
    dppo,
    dual_clip,
    fspo,
    gmpo,
    sapo,
    topr,
    vespo,
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


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "expected", "slope"),
    [
        ([0.5, 0.3], 1.0, -math.exp(0.2 * 2**0.5), 0.0),  # 0.8 is above 0.2 sqrt(2)
        ([0.5, 0.3], -1.0, math.exp(0.8), 2 * math.exp(0.8)),  # two tokens of loss
        ([-0.5, 0.3], -1.0, math.exp(-0.1 * 2**0.5), 0.0),  # -0.2 is below -0.1 sqrt(2)
        ([-0.5, 0.4], -1.0, math.exp(-0.1), 2 * math.exp(-0.1)),
        ([0.02] * 100, 1.0, -math.exp(0.2 * 10), 0.0),  # 2.0 is at the band of 100 tokens ...
        ([0.019] * 100, 1.0, -math.exp(1.9), -100 * math.exp(1.9)),  # ... and 1.9 is within
        ([15.0, 15.0], -1.0, math.exp(20), 0.0),  # the clamp of the exponent
    ],
)
def test_fspo_hand_computed(log_ratio, advantage, expected, slope):
    inputs = inputs_of([d + 1e-9 for d in log_ratio], [advantage] * len(log_ratio), clip_low=0.1, clip_high=0.2)
    loss, gradient, clipped = evaluated(fspo, inputs)
    torch.testing.assert_close(loss, torch.full_like(loss, expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.full_like(gradient, slope), rtol=1e-6, atol=0)
    assert clipped == [slope == 0.0 and expected != math.exp(20)] * len(log_ratio)


def test_clip_with_length_scaling_clips_the_responses_that_fspo_clips():
    generator = torch.Generator().manual_seed(0)
    counts = 0
    for length in (1, 4, 50, 400):
        for advantage in (1.0, -2.0):
            d = 0.03 * torch.randn(length, generator=generator, dtype=torch.float64)
            terms, chosen = inputs_of(d.tolist(), [advantage] * length, clip_low=0.01, clip_high=0.02)
            chosen = replace(chosen, pg_clip_length_scaling=True)
            mean = terms.log_ratio.mean()
            terms = replace(terms, ratio=mean.exp().expand(1, length))
            loss, gradient, clipped = evaluated(clip, (terms, chosen))
            assert clipped == evaluated(fspo, (terms, chosen))[2]
            counts += clipped[0]
            bounds = math.exp(-0.01 / length**0.5), math.exp(0.02 / length**0.5)
            if clipped[0]:
                torch.testing.assert_close(loss, torch.full_like(loss, -advantage * bounds[int(advantage > 0)]))
            assert (float(gradient.abs().max()) == 0) == clipped[0]
    assert 0 < counts < 8


def test_vespo_hand_computed():
    # w = 2: 2^2 e^(3 (1 - 2)) for A > 0, 2^3 e^(2 (1 - 2)) for A < 0. The weight has no gradient.
    log_ratio = [math.log(4.0), -math.log(2.0)]
    for advantage, weight in ((1.5, 4 * math.exp(-3)), (-1.5, 8 * math.exp(-2))):
        loss, gradient, clipped = evaluated(vespo, inputs_of(log_ratio, [advantage] * 2, log_probs=-0.5))
        torch.testing.assert_close(gradient, row(*[-weight * advantage] * 2))
        torch.testing.assert_close(loss, row(*[0.5 * weight * advantage] * 2))
        assert clipped == [False] * 2
    on_policy = evaluated(vespo, inputs_of([0.0], [-3.0]))[1]
    torch.testing.assert_close(on_policy, row(3.0))
    far = evaluated(vespo, inputs_of([19.0, 19.0], [1.0, -1.0]))[1]
    assert far.tolist() == [[0.0, 0.0]], "a response that has become too likely has no weight"


@pytest.mark.parametrize(
    ("new", "old", "advantage", "divergence", "outside"),
    [
        (0.9, 0.7, 1.0, "tv", True),  # 0.2 further up
        (0.9, 0.7, -1.0, "tv", False),  # moves back
        (0.7, 0.9, -1.0, "tv", True),
        (0.7, 0.9, 1.0, "tv", False),
        (0.9, 0.8, 1.0, "tv", False),  # 0.1
        (1e-3, 1e-5, 1.0, "tv", False),  # a ratio of 100, which a clip of the ratio would remove
        (0.9, 0.7, 1.0, "kl", True),  # 0.7 log(7 / 9) + 0.3 log 3 = 0.154
        (0.9, 0.8, 1.0, "kl", False),  # 0.8 log(8 / 9) + 0.2 log 2 = 0.044
        (0.9, 0.79, 1.0, "kl", True),  # 0.053
        (1.0, 0.5, 1.0, "kl", True),
        (0.5, 1.0, -1.0, "kl", True),  # 0.69
        (1.0, 1.0, 1.0, "kl", False),
    ],
)
def test_dppo_hand_computed(new, old, advantage, divergence, outside):
    threshold = {"tv": 0.15, "kl": 0.05}[divergence]
    inputs = inputs_of(
        [math.log(new / old)],
        [advantage],
        log_probs=math.log(new),
        dppo_divergence=divergence,
        dppo_threshold=threshold,
    )
    loss, gradient, clipped = evaluated(dppo, inputs)
    expected = 0.0 if outside else -new / old * advantage
    torch.testing.assert_close(loss, row(expected))
    torch.testing.assert_close(gradient, row(expected))
    assert clipped == [outside]


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_loss_without_advantage_has_no_gradient(name):
    inputs = inputs_of([0.5, -3.0, 0.0], [0.0] * 3, clip_low=0.2, clip_high=0.2)
    loss, gradient, clipped = evaluated(POLICY_LOSSES.load(name), inputs)
    assert (float(loss.abs().sum()), float(gradient.abs().sum())) == (0.0, 0.0)
    assert clipped == [False] * 3
