"""Every valid pair of ratio and policy loss against the independent implementation, and its invariances."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import policy_reference as reference
from reference.gspo_cases import Case, random_case

from roll_gspo.algorithms.aggregate import LOSS_AGG_MODES, Denominators
from roll_gspo.algorithms.correction import CorrectionSettings
from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.policy_loss import policy_loss
from roll_gspo.algorithms.sample_weighting import length_quartiles
from roll_gspo.declarations import POLICY_LOSSES, RATIOS
from roll_gspo.metrics import merge, to_floats

MODES = sorted(LOSS_AGG_MODES)
PAIRS = [(r, p) for p in POLICY_LOSSES for r in RATIOS if r == "token" or not POLICY_LOSSES.declaration(p).own_ratio]
CORRECTIONS = [
    CorrectionSettings("token", "truncate", 0.5, 1.2),
    CorrectionSettings("token", "mask", 0.6, 1.5),
    CorrectionSettings("geometric", "mask", 0.8, 1.3),
    CorrectionSettings("sequence", "truncate", 0.5, 2.0),
]
TAU = (0.8, 1.3)
VESPO = {"vespo_positive": (1.5, 2.5), "vespo_negative": (2.5, 1.5)}
WIDTH = 9


def settings_of(pair, mode, low=0.2, high=0.27, dual=None, correction=None) -> PolicyLossSettings:
    level, name = pair
    declared = POLICY_LOSSES.declaration(name)
    return PolicyLossSettings(
        level,
        low if declared.needs_clip_range else None,
        high if declared.needs_clip_range else None,
        dual if declared.allows_dual_clip else None,
        mode,
        response_length=WIDTH,
        policy_loss=name,
        sapo_tau_positive=TAU[0],
        sapo_tau_negative=TAU[1],
        vespo_k_positive=VESPO["vespo_positive"][0],
        vespo_lambda_positive=VESPO["vespo_positive"][1],
        vespo_k_negative=VESPO["vespo_negative"][0],
        vespo_lambda_negative=VESPO["vespo_negative"][1],
        correction=correction,
    )


def loss_and_gradient(case: Case, chosen: PolicyLossSettings, denominators: tuple[Denominators, ...] = ()):
    """Loss, gradient [B, T] and metrics; a differentiable stand-in entropy."""
    log_probs = case.log_probs.clone().requires_grad_()
    entropy = -log_probs.square()
    seen = case.mask if case.policy_mask is None else case.policy_mask
    whole, of_policy = denominators or (Denominators.of(case.mask), Denominators.of(seen))
    loss, metrics = policy_loss(log_probs, entropy, case.batch(), whole, chosen, of_policy)
    loss.backward()
    return loss.detach(), log_probs.grad, metrics


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 5),
    width=st.integers(1, 7),
    spread=st.sampled_from([0.0, 1e-3, 0.3, 2.0, 15.0]),
    clip=st.sampled_from([(3e-4, 4e-4), (0.2, 0.27), (1.0, 4.0)]),
    dual=st.sampled_from([None, 1.4]),
    mode=st.sampled_from(MODES),
    correction=st.sampled_from([None, *CORRECTIONS]),
    gaps=st.booleans(),
    scaling=st.booleans(),
    region=st.sampled_from([("tv", 0.15), ("tv", 0.01), ("kl", 0.05)]),
)
def test_policy_loss_value_and_gradient_equal_the_reference(
    pair, seed, batch, width, spread, clip, dual, mode, correction, gaps, scaling, region
):
    case = random_case(seed, batch, width, spread, gaps=gaps, weighted=True)
    case.advantages[:, -1] = 0.0
    scaling = scaling and pair in (("seq", "clip"), ("seq_token", "clip"))
    ours = replace(
        settings_of(pair, mode, *clip, dual, correction),
        pg_clip_length_scaling=scaling,
        dppo_divergence=region[0],
        dppo_threshold=region[1],
    )
    loss, gradient, metrics = loss_and_gradient(case, ours)
    chosen = reference.Objective(*pair, *clip, dual if pair[1] == "clip" else None, *TAU, scaling, **VESPO)
    chosen = replace(chosen, divergence=region[0], threshold=region[1])
    new, old, a, mask = case.tables()
    token_weights = [[1.0] * width for _ in mask]
    if correction is not None:
        token_weights = reference.correction(
            old,
            case.rollout.tolist(),
            mask,
            correction.level,
            correction.mode,
            correction.lower_bound,
            correction.upper_bound,
        )
    expected, slope = reference.loss_and_gradient(
        new, old, a, mask, chosen, mode, WIDTH, case.weights.tolist(), token_weights
    )
    scale = max(1.0, abs(expected))
    assert float(loss) == pytest.approx(expected, rel=1e-6, abs=1e-9 * scale)
    torch.testing.assert_close(gradient, torch.tensor(slope, dtype=torch.float64), rtol=1e-6, atol=1e-9 * scale)
    assert to_floats(metrics)["actor/pg_loss"] == float(loss)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pair", [p for p in PAIRS if p[1] in ("clip", "gmpo", "sapo", "fspo", "dppo")], ids="/".join)
def test_policy_loss_gradcheck_of_every_differentiable_pair(pair, mode):
    # cispo, topr and vespo stop gradients in their value, and seq_token where advantages vary within a sample: there
    # only the analytic gradients of the reference can tell.
    constant = pair[0] == "seq_token"
    case = random_case(11, batch=4, width=5, constant_advantages=constant, gaps=True, weighted=True)
    correction = CORRECTIONS[2] if constant else CORRECTIONS[0]
    chosen = replace(settings_of(pair, mode, dual=1.4, correction=correction), kl_loss_coef=0.1, entropy_loss_coef=0.1)
    denominators = Denominators.of(case.mask)

    def total(log_probs, entropy):
        return policy_loss(log_probs, entropy, case.batch(), denominators, chosen)[0]

    inputs = case.log_probs.requires_grad_(), case.old.abs().requires_grad_()
    assert torch.autograd.gradcheck(total, inputs, eps=1e-7)


def padded(case: Case, rows: torch.Tensor, extra: int) -> Case:
    """Some samples of a case in a wider frame, NaN in the new positions."""

    def widened(t):
        return torch.nn.functional.pad(t[rows], (0, extra), value=math.nan)

    mask = torch.nn.functional.pad(case.mask[rows], (0, extra))
    tensors = [widened(t) for t in (case.log_probs, case.old, case.advantages)]
    policy_mask = torch.nn.functional.pad(case.policy_mask[rows], (0, extra))
    quartiles = case.quartiles[rows]
    return Case(*tensors, mask, widened(case.ref), widened(case.rollout), case.weights[rows], policy_mask, quartiles)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_policy_loss_of_a_mini_batch_is_invariant_to_split_order_and_padding(pair, mode, dtype, tolerance):
    case = random_case(7, batch=6, width=7, dtype=dtype, gaps=True, weighted=True)
    case.policy_mask = case.mask & (case.ref > case.ref[case.mask].median())
    case.quartiles = length_quartiles(case.mask.sum(-1))
    correction = CORRECTIONS[(PAIRS.index(pair) + MODES.index(mode)) % len(CORRECTIONS)]
    chosen = replace(settings_of(pair, mode, dual=1.4, correction=correction), kl_loss_coef=0.1, entropy_loss_coef=0.05)
    chosen = replace(chosen, off_policy_mask_threshold=0.05)
    denominators = Denominators.of(case.mask), Denominators.of(case.policy_mask)
    whole, gradient, metrics = loss_and_gradient(case, chosen)
    assert float(gradient[case.mask].abs().max()) > 1e-3
    generator = torch.Generator().manual_seed(3)
    for size in range(1, 7):
        shares, parts, gradients = [], [], torch.zeros_like(gradient)
        for rows in torch.randperm(6, generator=generator).split(size):
            share, piece, piece_metrics = loss_and_gradient(padded(case, rows, size), chosen, denominators)
            shares.append(share)
            parts.append(piece_metrics)
            gradients[rows] = piece[:, :7].nan_to_num(nan=math.inf)
        torch.testing.assert_close(sum(shares), whole, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradients[case.mask], gradient[case.mask], rtol=tolerance, atol=tolerance)
        assert to_floats(merge(parts)) == pytest.approx(to_floats(metrics), rel=10 * tolerance, abs=10 * tolerance)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_policy_loss_garbage_where_masked_changes_nothing(pair, garbage):
    case = random_case(9, batch=6, width=6, gaps=True, weighted=True)
    chosen = replace(settings_of(pair, "seq-mean-token-mean", dual=1.4, correction=CORRECTIONS[3]), kl_loss_coef=0.1)

    def soiled(t):
        return torch.where(case.mask, t, garbage)

    tensors = [soiled(t) for t in (case.log_probs, case.old, case.advantages)]
    dirty = Case(*tensors, case.mask, soiled(case.ref), soiled(case.rollout), case.weights)
    results = []
    for one in (case, dirty):
        log_probs = one.log_probs.clone().requires_grad_()
        loss, metrics = policy_loss(log_probs, soiled(case.old), one.batch(), Denominators.of(case.mask), chosen)
        loss.backward()
        results.append((loss.detach(), log_probs.grad, to_floats(metrics)))
    (loss, gradient, metrics), (dirty_loss, dirty_gradient, dirty_metrics) = results
    assert torch.equal(dirty_loss, loss)
    assert torch.equal(dirty_gradient, gradient)
    assert dirty_metrics == metrics
    assert float(gradient[~case.mask].abs().sum()) == 0


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_policy_loss_edges_of_every_pair(pair):
    chosen = settings_of(pair, "seq-mean-token-mean")
    alone = random_case(3, batch=1, width=1, spread=0.01)  # within every clip range
    loss, gradient, _ = loss_and_gradient(alone, chosen)
    assert bool(loss.isfinite())
    assert float(gradient.abs()) > 0
    without_advantage = replace(random_case(3), advantages=torch.zeros(5, 7, dtype=torch.float64))
    loss, gradient, metrics = loss_and_gradient(without_advantage, chosen)
    assert (float(loss), float(gradient.abs().sum())) == (0, 0)
    assert to_floats(metrics)["actor/clip_fraction"] == 0
    empty = random_case(3)
    empty.mask = torch.zeros_like(empty.mask)
    loss, gradient, metrics = loss_and_gradient(empty, chosen)
    assert (float(loss), float(gradient.abs().sum())) == (0, 0)
    # Merged with a micro-batch that has tokens, an empty one leaves no trace in the metrics.
    figures = loss_and_gradient(random_case(3), chosen)[2]
    assert to_floats(merge([metrics, figures])) == to_floats(figures)


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_policy_loss_bf16_of_every_pair_is_computed_in_float32(pair):
    low = random_case(6, dtype=torch.bfloat16)
    high = Case(*[t.float() for t in (low.log_probs, low.old, low.advantages)], low.mask, low.ref.float())
    chosen = settings_of(pair, "token-mean")
    losses, gradients = [], []
    for case in (low, high):
        log_probs = case.log_probs.clone().requires_grad_()
        loss, _ = policy_loss(log_probs, None, case.batch(), Denominators.of(case.mask), chosen)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(log_probs.grad)
    assert losses[0].dtype == torch.float32
    assert torch.equal(*losses)
    assert torch.equal(gradients[0], gradients[1].bfloat16())


@pytest.mark.parametrize("level", ["token", "seq", "seq_token", "segment"])
def test_policy_loss_sapo_and_clip_agree_in_gradient_on_policy(level):
    # At ratio 1 SAPO's gate has slope 1 for both temperatures (its factor 4 / tau): the plain policy gradient.
    case = random_case(5, spread=0.0, gaps=True)
    sapo = loss_and_gradient(case, settings_of((level, "sapo"), "token-mean"))[1]
    clip = loss_and_gradient(case, settings_of((level, "clip"), "token-mean"))[1]
    torch.testing.assert_close(sapo, clip, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_policy_loss_sees_only_the_tokens_of_its_mask(mode):
    # Eq. 6 of arXiv 2506.01939: the mask is a factor of the surrogate and of the normaliser, not of ratio and KL.
    case = random_case(13, batch=6, gaps=True, weighted=True)
    case.policy_mask = case.mask & (case.ref > case.ref[case.mask].median())
    chosen = settings_of(("seq", "clip"), mode)
    loss, gradient, metrics = loss_and_gradient(case, chosen)
    objective = reference.Objective("seq", "clip", 0.2, 0.27)
    new, old, a, mask = case.tables()
    rows = [reference.row_loss(*row, objective) for row in zip(new, old, a, mask, strict=True)]
    seen = case.policy_mask.tolist()
    expected = reference.aggregated([row[0] for row in rows], seen, mode, WIDTH, case.weights.tolist())
    assert float(loss) == pytest.approx(expected, rel=1e-9)
    unseen = case.mask & ~case.policy_mask
    assert float(gradient[unseen].abs().max()) > 0, "the ratio of the sequence depends on all of its tokens"
    alone = loss_and_gradient(case, settings_of(("token", "clip"), mode))[1]
    assert float(alone[unseen].abs().max()) == 0 and float(alone[case.policy_mask].abs().max()) > 0
    without = to_floats(loss_and_gradient(replace(case, policy_mask=None), replace(chosen, kl_loss_coef=0.1))[2])
    assert (
        without["actor/kl_loss"]
        == to_floats(loss_and_gradient(case, replace(chosen, kl_loss_coef=0.1))[2])["actor/kl_loss"]
    )
    assert set(without) == set(metrics) | {"actor/kl_loss"}
