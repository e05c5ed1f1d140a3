import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gspo_reference as reference
from reference.gspo_cases import Case, random_case

from roll_gspo.algorithms.aggregate import LOSS_AGG_MODES, Denominators
from roll_gspo.algorithms.correction import CorrectionSettings
from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.policy_loss import has_gradient, policy_loss
from roll_gspo.declarations import RATIOS
from roll_gspo.metrics import to_floats

LEVELS, MODES = sorted(RATIOS), sorted(LOSS_AGG_MODES)
GSPO = PolicyLossSettings("seq", 3e-4, 4e-4, None, "seq-mean-token-mean", response_length=8)
WIDE = replace(GSPO, clip_low=0.2, clip_high=0.27)
FULL = replace(WIDE, dual_clip_ratio=1.4, kl_loss_coef=0.1, entropy_loss_coef=0.05)


def loss_and_gradient(case: Case, chosen: PolicyLossSettings, denominators: Denominators | None = None):
    """Loss, gradient [B, T] and metrics of a case; a differentiable stand-in entropy, NaN where masked."""
    log_probs = case.log_probs.clone().requires_grad_()
    kept = torch.where(case.mask, log_probs, 0.0)
    entropy = torch.where(case.mask, -kept * kept.exp(), math.nan)
    loss, metrics = policy_loss(log_probs, entropy, case.batch(), denominators or Denominators.of(case.mask), chosen)
    loss.backward()
    return loss.detach(), log_probs.grad, metrics


def hand_case() -> Case:
    """Sample 0: d = (0.3, -0.1), A = 1; sample 1: d = (0, -0.6, 0), A = -2; a masked position full of NaN."""
    old = torch.full((2, 3), -1.0)
    log_probs = old + torch.tensor([[0.3, -0.1, math.nan], [0.0, -0.6, 0.0]])
    advantages = torch.tensor([[1.0, 1.0, math.nan], [-2.0, -2.0, -2.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return Case(log_probs, torch.where(mask, old, math.inf), advantages, mask, old)


def test_policy_loss_gspo_hand_computed():
    loss, gradient, metrics = loss_and_gradient(hand_case(), replace(GSPO, clip_low=0.15, clip_high=0.2))
    s0, s1 = math.exp(0.1), math.exp(-0.2)
    # s1 < 0.85 and A < 0: clipped at 0.85, no gradient; the gradient of s0 is s0 / n on each of its tokens.
    assert float(loss) == pytest.approx((-s0 + 2 * 0.85) / 2)
    torch.testing.assert_close(gradient, torch.tensor([[-s0 / 4, -s0 / 4, 0.0], [0.0, 0.0, 0.0]]))
    figures = to_floats(metrics)
    assert figures["actor/clip_fraction"] == pytest.approx(3 / 5)
    assert figures["actor/clip_fraction_sequence"] == 0.5
    assert figures["actor/clip_fraction_low"] == pytest.approx(3 / 5)
    assert figures["actor/clip_fraction_high"] == 0.0
    assert figures["actor/ratio_mean"] == pytest.approx((2 * s0 + 3 * s1) / 5)
    assert figures["actor/ratio_max"] == pytest.approx(s0)
    assert figures["actor/ratio_min"] == pytest.approx(s1)
    assert figures["actor/ratio_deviation"] == pytest.approx((2 * (s0 - 1) + 3 * (1 - s1)) / 5)
    k3 = (math.exp(0.3) - 1.3) + (math.exp(-0.1) - 0.9) + (math.exp(-0.6) - 0.4)
    assert figures["actor/approx_kl"] == pytest.approx(k3 / 5, rel=1e-5)
    assert figures["actor/log_prob_mean"] == pytest.approx((-0.7 - 1.1 - 1.0 - 1.6 - 1.0) / 5)
    assert figures["actor/pg_loss"] == figures["actor/total_loss"] == pytest.approx(float(loss))


def test_policy_loss_token_hand_computed():
    loss, gradient, metrics = loss_and_gradient(
        hand_case(), replace(WIDE, importance_sampling="token", loss_agg_mode="token-mean")
    )
    # d = 0.3 with A > 0 is above 1.27; d = -0.6 with A < 0 is below 0.8; the others keep their gradient.
    assert float(loss) == pytest.approx((-1.27 - math.exp(-0.1) + 2 + 2 * 0.8 + 2) / 5)
    expected = torch.tensor([[0.0, -math.exp(-0.1), 0.0], [2.0, 0.0, 2.0]]) / 5
    torch.testing.assert_close(gradient, expected)
    figures = to_floats(metrics)
    assert figures["actor/clip_fraction"] == pytest.approx(2 / 5)
    assert figures["actor/clip_fraction_sequence"] == 1.0
    assert figures["actor/clip_fraction_high"] == pytest.approx(1 / 5)
    assert figures["actor/clip_fraction_low"] == pytest.approx(1 / 5)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 6),
    width=st.integers(1, 8),
    spread=st.sampled_from([1e-3, 0.3, 2.0]),
    clip=st.sampled_from([(3e-4, 4e-4), (0.2, 0.27)]),
    dual=st.sampled_from([None, 1.4]),
    level=st.sampled_from(LEVELS),
    mode=st.sampled_from(MODES),
)
def test_policy_loss_equals_the_reference(seed, batch, width, spread, clip, dual, level, mode):
    case = random_case(seed, batch, width, spread)
    chosen = PolicyLossSettings(level, *clip, dual, mode, response_length=9)
    loss, _, metrics = loss_and_gradient(case, chosen)
    tables = [t.tolist() for t in (case.log_probs, case.old, case.advantages, case.mask)]
    assert float(loss) == pytest.approx(
        reference.policy_loss(*tables, level, *clip, dual, mode, 9), rel=1e-6, abs=1e-12
    )
    mask = case.mask.tolist()
    rho = reference.ratios(tables[0], tables[1], mask, level)
    flags = [
        [m and reference.gradient_is_clipped(r, a, *clip) for r, a, m in zip(*rows, strict=True)]
        for rows in zip(rho, tables[2], mask, strict=True)
    ]
    figures = to_floats(metrics)
    assert figures["actor/clip_fraction"] == pytest.approx(sum(map(sum, flags)) / sum(map(sum, mask)))
    assert figures["actor/clip_fraction_sequence"] == pytest.approx(sum(map(any, flags)) / sum(map(any, mask)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
def test_policy_loss_gradcheck(level, mode):
    # The stop-gradient of seq_token is invisible to finite differences only where advantages are constant.
    case = random_case(1, batch=4, width=5, constant_advantages=level == "seq_token")
    chosen = replace(FULL, importance_sampling=level, loss_agg_mode=mode)
    denominators = Denominators.of(case.mask)

    def total(log_probs, entropy):
        return policy_loss(log_probs, entropy, case.batch(), denominators, chosen)[0]

    entropy = case.old.abs().requires_grad_()
    assert torch.autograd.gradcheck(total, (case.log_probs.requires_grad_(), entropy), eps=1e-7)


@pytest.mark.parametrize("name", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_seq_token_equals_seq_for_constant_advantages(mode, name):
    case = random_case(5, batch=8, width=9, spread=0.5, constant_advantages=True)
    case.log_probs[2, 0] = case.old[2, 0] - 30  # beyond the clamp
    seq_loss, seq_gradient, _ = loss_and_gradient(case, replace(WIDE, loss_agg_mode=mode, policy_loss=name))
    chosen = replace(WIDE, importance_sampling="seq_token", loss_agg_mode=mode, policy_loss=name)
    loss, gradient, _ = loss_and_gradient(case, chosen)
    torch.testing.assert_close(loss, seq_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, seq_gradient, rtol=1e-9, atol=1e-14)
    assert float(gradient.abs().max()) > 0


def test_policy_loss_seq_token_differs_from_seq_for_token_advantages():
    case = random_case(5, batch=8, width=9, spread=1e-3)
    wide = replace(WIDE, clip_low=0.9, clip_high=9.0)
    _, seq_gradient, _ = loss_and_gradient(case, wide)
    _, gradient, _ = loss_and_gradient(case, replace(wide, importance_sampling="seq_token"))
    assert float((gradient - seq_gradient).abs().max()) > 1e-3
    # The gradient of GSPO-token per token, unclipped: -s_i A_it / n_i / N_seq.
    s = torch.tensor(
        reference.ratios(case.log_probs.tolist(), case.old.tolist(), case.mask.tolist(), "seq"),
        dtype=torch.float64,
    )
    lengths = case.mask.sum(-1, keepdim=True).clamp(min=1)
    expected = torch.where(case.mask, -s * case.advantages / lengths / case.mask.any(-1).sum(), 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", LEVELS)
def test_policy_loss_masked_garbage_reaches_neither_value_nor_gradient(level, garbage):
    case = random_case(9, batch=6, width=5)
    chosen = replace(FULL, importance_sampling=level)
    clean_loss, clean_gradient, clean_metrics = loss_and_gradient(case, chosen)

    def soiled(values: torch.Tensor) -> torch.Tensor:
        return torch.where(case.mask, values, garbage)

    dirty = Case(*map(soiled, (case.log_probs, case.old, case.advantages)), case.mask, soiled(case.ref))
    loss, gradient, metrics = loss_and_gradient(dirty, chosen)
    assert torch.equal(loss, clean_loss)
    assert to_floats(metrics) == to_floats(clean_metrics)
    assert torch.equal(gradient, clean_gradient)
    assert float(gradient[~case.mask].abs().sum()) == 0
    assert float(gradient[case.mask].abs().max()) > 0


def without_entropy(chosen: PolicyLossSettings) -> PolicyLossSettings:
    return replace(chosen, entropy_loss_coef=0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_policy_loss_without_any_valid_token_is_zero(level):
    case = random_case(2, batch=3, width=4)
    case.mask = torch.zeros_like(case.mask)
    loss, gradient, metrics = loss_and_gradient(case, replace(FULL, importance_sampling=level))
    assert float(loss) == 0
    assert float(gradient.abs().sum()) == 0
    assert to_floats(metrics)["actor/clip_fraction"] == 0.0


def test_policy_loss_gradient_at_ratio_one_is_the_policy_gradient():
    # On-policy, every level gives the same sample-mean gradient: -A_i / n_i / N_seq.
    case = random_case(8, spread=0.0, constant_advantages=True)
    lengths = case.mask.sum(-1, keepdim=True).clamp(min=1)
    expected = torch.where(case.mask, -case.advantages / lengths / case.mask.any(-1).sum(), 0.0)
    for level in LEVELS:
        _, gradient, metrics = loss_and_gradient(case, replace(GSPO, importance_sampling=level))
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
        assert to_floats(metrics)["actor/clip_fraction"] == 0.0


def test_policy_loss_bf16_is_computed_in_float32():
    case = random_case(6, dtype=torch.bfloat16)
    raised = Case(case.log_probs.float(), case.old.float(), case.advantages.float(), case.mask, case.ref.float())
    low = case.log_probs.clone().requires_grad_()
    denominators = Denominators.of(case.mask)
    loss, _ = policy_loss(low, None, case.batch(), denominators, without_entropy(FULL))
    loss.backward()
    expected, gradient, _ = loss_and_gradient(raised, without_entropy(FULL))
    assert loss.dtype == torch.float32
    assert torch.equal(loss.detach(), expected)
    assert low.grad.dtype == torch.bfloat16
    assert torch.equal(low.grad, gradient.bfloat16())


def test_policy_loss_adds_kl_and_entropy_as_the_metrics_say():
    case = random_case(3)
    pg, _, _ = loss_and_gradient(case, without_entropy(WIDE))
    total, _, metrics = loss_and_gradient(case, replace(FULL, dual_clip_ratio=None))
    figures = to_floats(metrics)
    mask = case.mask.tolist()
    kl = reference.kl_table(case.log_probs.tolist(), case.ref.tolist(), mask, "k3")
    entropy = (-case.log_probs * case.log_probs.exp()).tolist()
    shares = [reference.aggregated(t, mask, "seq-mean-token-mean", 8, [1.0] * 5) for t in (kl, entropy)]
    assert figures["actor/pg_loss"] == pytest.approx(float(pg))
    assert figures["actor/kl_loss"] == pytest.approx(shares[0])
    assert figures["actor/kl_ref"] == pytest.approx(sum(map(sum, kl)) / sum(map(sum, mask)))
    assert float(total) == pytest.approx(float(pg) + 0.1 * shares[0] - 0.05 * shares[1])
    assert figures["actor/total_loss"] == pytest.approx(float(total))


def test_policy_loss_dual_clip_is_counted():
    case = Case(
        torch.tensor([[0.0, 0.0]]),
        torch.tensor([[-1.0, 0.0]]),
        torch.tensor([[-1.0, -1.0]]),
        torch.ones(1, 2, dtype=torch.bool),
        torch.zeros(1, 2),
    )
    chosen = replace(WIDE, importance_sampling="token", dual_clip_ratio=1.4)
    loss, gradient, metrics = loss_and_gradient(case, chosen)
    assert float(loss) == pytest.approx((1.4 + 1.0) / 2)
    assert gradient.tolist() == [[0.0, 0.5]]
    figures = to_floats(metrics)
    assert figures["actor/dual_clip_fraction"] == 0.5
    assert figures["actor/clip_fraction"] == 0.0


def test_policy_loss_metrics_carry_no_gradient():
    _, _, metrics = loss_and_gradient(random_case(3), FULL)
    assert not any(m.value.requires_grad or m.weight.requires_grad for m in metrics.values())


def test_policy_loss_without_reference_or_entropy():
    case = random_case(3)
    batch = replace(case.batch(), ref_log_probs=None)
    denominators = Denominators.of(case.mask)
    _, metrics = policy_loss(case.log_probs, None, batch, denominators, WIDE)
    assert not {"actor/kl_ref", "actor/kl_loss", "actor/entropy"} & metrics.keys()
    with pytest.raises(ValueError, match="ref_log_probs"):
        policy_loss(case.log_probs, None, batch, denominators, replace(WIDE, kl_loss_coef=0.1))
    with pytest.raises(ValueError, match="entropy_loss_coef"):
        policy_loss(case.log_probs, None, batch, denominators, replace(WIDE, entropy_loss_coef=0.1))


@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_sample_weights_multiply_the_pg_loss_alone(mode):
    case = random_case(3, weighted=True)
    chosen = replace(FULL, loss_agg_mode=mode)
    _, gradient, metrics = loss_and_gradient(case, chosen)
    case.weights, weights = torch.full_like(case.weights, 3.0), case.weights
    _, tripled, figures = loss_and_gradient(case, chosen)
    plain = loss_and_gradient(replace(case, weights=None), chosen)[2]
    figures, plain, metrics = to_floats(figures), to_floats(plain), to_floats(metrics)
    assert figures["actor/pg_loss"] == pytest.approx(3 * plain["actor/pg_loss"])
    changed = {"actor/pg_loss", "actor/total_loss"}
    assert all(figures[name] == plain[name] == metrics[name] for name in plain.keys() - changed)
    # The weights of the samples are independent: each scales the gradient of its pg loss.
    without = replace(chosen, kl_loss_coef=0.0, entropy_loss_coef=0.0)
    others = loss_and_gradient(case, chosen)[1] - loss_and_gradient(case, without)[1]
    expected = others + (tripled - others) / 3 * weights[:, None]
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_policy_loss_of_a_zero_sample_weight_keeps_the_denominators():
    case = random_case(3, weighted=True)
    case.weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    dropped = replace(case, advantages=case.advantages * case.weights[:, None], weights=None)
    loss, gradient, _ = loss_and_gradient(case, WIDE)
    expected, expected_gradient, _ = loss_and_gradient(dropped, WIDE)
    torch.testing.assert_close((loss, gradient), (expected, expected_gradient))


def test_policy_loss_of_a_masked_sample_leaves_the_others_a_smaller_denominator():
    case = random_case(3)
    case.mask[2] = False
    kept = [0, 1, 3, 4]
    fewer = Case(*[t[kept] for t in (case.log_probs, case.old, case.advantages, case.mask, case.ref)])
    loss, gradient, metrics = loss_and_gradient(case, FULL)
    expected, expected_gradient, expected_metrics = loss_and_gradient(fewer, FULL)
    torch.testing.assert_close((loss, gradient[kept]), (expected, expected_gradient))
    assert to_floats(metrics) == pytest.approx(to_floats(expected_metrics))


def test_policy_loss_luspo_is_gspo_with_each_sequence_times_its_length():
    # arXiv 2602.05261: the objective of a sequence times |y_i|, as a sum over its tokens or as a sample weight.
    case = random_case(5, batch=8, width=9, constant_advantages=True)
    summed = loss_and_gradient(case, replace(WIDE, loss_agg_mode="seq-mean-token-sum"))
    weighted = loss_and_gradient(replace(case, weights=case.mask.sum(-1)), WIDE)
    torch.testing.assert_close(summed[:2], weighted[:2], rtol=1e-12, atol=1e-14)
    mask, s = case.mask.tolist(), reference.ratios(*[t.tolist() for t in (case.log_probs, case.old, case.mask)], "seq")
    terms = [
        sum(row) * reference.surrogate_loss(rho[0], a[0], 0.2, 0.27, None)
        for row, rho, a in zip(mask, s, case.advantages.tolist(), strict=True)
        if any(row)
    ]
    assert float(summed[0]) == pytest.approx(sum(terms) / len(terms))


def test_policy_loss_correction_multiplies_the_token_losses():
    case = hand_case()
    rollout = case.old - torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, math.log(4.0), 0.0]])
    correction = CorrectionSettings("token", "truncate", 0.0, 3.0)
    chosen = replace(WIDE, importance_sampling="token", loss_agg_mode="token-mean", correction=correction)
    loss, gradient, metrics = loss_and_gradient(replace(case, rollout=rollout), chosen)
    assert float(loss) == pytest.approx((2 * -1.27 - math.exp(-0.1) + 2 + 3 * 2 * 0.8 + 2) / 5)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -math.exp(-0.1), 0.0], [2.0, 0.0, 2.0]]) / 5)
    figures = to_floats(metrics)
    assert figures["correction/weight_mean"] == pytest.approx((2 + 1 + 1 + 3 + 1) / 5)
    assert figures["correction/bounded_fraction"] == pytest.approx(1 / 5)
    assert figures["actor/clip_fraction"] == pytest.approx(2 / 5)


def test_policy_loss_mask_decides_whatever_the_token_ids_say():
    # EOS may be the padding token: an EOS in the mask is trained on, a padding token outside is not.
    case = random_case(3)
    batch = case.batch()
    denominators = Denominators.of(case.mask)
    losses = []
    for token in (0, 7):
        sequences = replace(batch.sequences, input_ids=torch.full_like(batch.sequences.input_ids, token))
        log_probs = case.log_probs.clone().requires_grad_()
        loss, _ = policy_loss(log_probs, None, replace(batch, sequences=sequences), denominators, WIDE)
        losses.append((float(loss.detach()), torch.autograd.grad(loss, log_probs)[0]))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])
    last = case.mask.sum(-1) - 1  # the end-of-sequence token of the first sample carries a gradient
    assert float(losses[0][1][0, last[0]].abs()) > 0


def test_policy_loss_high_and_low_clips_add_up():
    case = random_case(5, batch=8, width=9, spread=1.0)
    for name in ("clip", "cispo", "gmpo"):
        chosen = replace(WIDE, importance_sampling="token", policy_loss=name)
        figures = to_floats(loss_and_gradient(case, chosen)[2])
        both = figures["actor/clip_fraction_high"], figures["actor/clip_fraction_low"]
        assert min(both) > 0
        assert sum(both) == pytest.approx(figures["actor/clip_fraction"])
    for name in ("sapo", "topr"):
        chosen = replace(WIDE, importance_sampling="token", policy_loss=name, clip_low=None, clip_high=None)
        assert "actor/clip_fraction_high" not in loss_and_gradient(case, chosen)[2]


def test_off_policy_mask_hand_computed():
    """Mean log(old / new) of 0.2, 0.2 and 0.1, against a threshold of 0.15; only negative advantages are dropped."""
    old = torch.full((3, 2), -1.0)
    log_probs = old + torch.tensor([[-0.3, -0.1], [-0.3, -0.1], [-0.1, -0.1]])
    advantages = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    case = Case(log_probs, old, advantages, torch.ones(3, 2, dtype=torch.bool), old)
    chosen = replace(WIDE, importance_sampling="token", clip_low=0.9, clip_high=0.9, loss_agg_mode="token-mean")
    loss, gradient, metrics = loss_and_gradient(case, replace(chosen, off_policy_mask_threshold=0.15))
    kept = -(math.exp(-0.3) + math.exp(-0.1)) + 2 * math.exp(-0.1)
    assert float(loss) == pytest.approx(kept / 6), "the denominators count every token"
    assert (gradient == 0).all(-1).tolist() == [True, False, False]
    assert to_floats(metrics)["actor/off_policy_masked_fraction"] == pytest.approx(1 / 3)
    # Against the generation engine: the mismatch counts too.
    shifted = replace(case, rollout=old + 0.3)
    _, gradient, metrics = loss_and_gradient(shifted, replace(chosen, off_policy_mask_threshold=0.45))
    assert (gradient == 0).all(-1).tolist() == [True, False, False]
    assert "actor/off_policy_masked_fraction" not in loss_and_gradient(case, chosen)[2]


def test_clip_fraction_by_length_is_that_of_the_quartile():
    case = hand_case()
    case.quartiles = torch.tensor([0, 3])
    figures = to_floats(loss_and_gradient(case, replace(GSPO, clip_low=0.15, clip_high=0.2))[2])
    assert [figures[f"actor/clip_fraction_length_q{q}"] for q in (1, 2, 3, 4)] == [0.0, 0.0, 0.0, 1.0]
    assert "actor/clip_fraction_length_q1" not in loss_and_gradient(hand_case(), GSPO)[2]


@pytest.mark.parametrize(
    ("changes", "advantage", "expected"),
    [
        ({}, 0.0, False),
        ({}, 1.0, True),
        ({"kl_loss_coef": 0.1}, 0.0, True),
        ({"entropy_loss_coef": 0.1}, 0.0, True),
        ({"policy_loss": "my_package.loss"}, 0.0, True),
        ({"policy_loss": "dppo"}, 0.0, False),
    ],
)
def test_has_gradient(changes, advantage, expected):
    case = hand_case()
    case.advantages = torch.full((2, 3), advantage)
    case.advantages[0, 2] = math.nan  # masked
    chosen = replace(GSPO, **changes)
    assert has_gradient(case.batch(), chosen) is expected
    assert not has_gradient(replace(case, mask=case.mask & False).batch(), chosen)


def test_has_gradient_sees_only_the_tokens_of_the_policy_loss():
    case = hand_case()
    case.advantages = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    case.policy_mask = torch.tensor([[True, False, False], [True, True, True]])
    assert not has_gradient(case.batch(), GSPO)
    assert has_gradient(replace(case, policy_mask=None).batch(), GSPO)
