"""Metrics of stale samples by hand and against the reference, and the decoupled objective."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import staleness_reference as reference
from reference.gspo_cases import Case, random_case

from roll_gspo.algorithms.aggregate import Denominators
from roll_gspo.algorithms.correction import CORRECTION_LEVELS, CorrectionSettings
from roll_gspo.algorithms.objective import PolicyLossSettings
from roll_gspo.algorithms.policy_loss import policy_loss
from roll_gspo.algorithms.staleness import (
    BUCKETS,
    effective_sample_size,
    engine_metrics,
    lag_buckets,
    lag_metrics,
    ratio_metrics_by_lag,
)
from roll_gspo.metrics import merge, to_floats

MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
LAGS = torch.tensor([[0, 3, 99], [1, 1, 1], [99, 99, 99]])


def test_buckets_are_0_1_2_3_to_4_and_5_or_more() -> None:
    assert lag_buckets(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 64]])).tolist() == [[0, 1, 2, 3, 3, 4, 4, 4]]


def test_distribution_of_lags_by_hand() -> None:
    assert lag_metrics(LAGS, MASK, max_lag=4) == {
        "staleness/mean": 6 / 5,
        "staleness/max": 3.0,
        "staleness/sample_max_mean": (3 + 1) / 2,
        "staleness/share_0": 1 / 5,
        "staleness/share_1": 3 / 5,
        "staleness/share_2": 0.0,
        "staleness/share_3": 1 / 5,
        "staleness/share_4": 0.0,
    }


def test_distribution_of_no_tokens_is_zero() -> None:
    found = lag_metrics(LAGS, torch.zeros_like(MASK))
    assert set(found.values()) == {0.0} and "staleness/share_0" in found


@pytest.mark.parametrize(
    ("level", "weights"),
    [
        ("token", [math.exp(d) for d in (0.1, -0.3, 0.0, 0.0, 0.4)]),
        ("geometric", [math.exp(-0.1), math.exp(0.4 / 3)]),
        ("sequence", [math.exp(-0.2), math.exp(0.4)]),
    ],
)
def test_effective_sample_size_by_hand(level: str, weights: list[float]) -> None:
    old = torch.tensor([[0.1, -0.3, math.nan], [0.0, 0.0, 0.4], [math.inf] * 3])
    found = to_floats({"ess": effective_sample_size(old, torch.zeros(3, 3), MASK, level)})["ess"]
    assert found == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / len(weights))


def test_effective_sample_size_of_one_dominating_weight_is_one_over_their_number() -> None:
    old = torch.tensor([[15.0], [0.0], [0.0], [0.0]])
    mask = torch.ones(4, 1, dtype=torch.bool)
    found = to_floats({"ess": effective_sample_size(old, torch.zeros(4, 1), mask, "sequence")})["ess"]
    assert found == pytest.approx(1 / 4, rel=1e-5)
    nothing = effective_sample_size(old, old, torch.zeros(4, 1, dtype=torch.bool), "sequence")
    assert to_floats({"ess": nothing}) == {"ess": 0.0}


def stale_case(seed: int, batch: int = 6, width: int = 7) -> tuple[Case, torch.Tensor]:
    """A random case with engine log-probs, and the bucket of each token."""
    case = random_case(seed, batch, width, gaps=True, weighted=True)
    lags = torch.randint(0, 7, (batch, width), generator=torch.Generator().manual_seed(seed))
    return case, lag_buckets(lags)


def test_mismatch_is_that_of_the_tokens_without_lag() -> None:
    case, buckets = stale_case(1)
    assert case.rollout is not None
    found = to_floats(engine_metrics(case.old, case.rollout, case.mask, buckets, "token"))
    fresh = case.mask & (buckets == 0)
    alone = to_floats(engine_metrics(case.old, case.rollout, fresh, None, "token"))
    assert {name: found[name] for name in alone} == alone and all(name.startswith("mismatch/") for name in alone)
    assert found["staleness/kl_lag_0"] == pytest.approx(alone["mismatch/kl"])
    assert found["staleness/log_prob_diff_mean_lag_0"] == pytest.approx(alone["mismatch/log_prob_diff_mean"])
    stale = to_floats(engine_metrics(case.old, case.rollout, case.mask & (buckets > 0), buckets, "token"))
    assert not [name for name in stale if name.startswith("mismatch/") or name.endswith("lag_0")]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(sorted(CORRECTION_LEVELS)))
def test_metrics_by_lag_equal_the_reference_for_any_split(seed: int, level: str) -> None:
    case, buckets = stale_case(seed)
    assert case.rollout is not None
    clipped = (case.log_probs > case.ref) & case.mask
    ratio = torch.where(case.mask, (case.log_probs - case.old).exp(), 1.0)

    def metrics(rows: torch.Tensor) -> dict[str, object]:
        policies = case.old[rows], case.rollout[rows]  # type: ignore[index]
        of_ratio = ratio_metrics_by_lag(ratio[rows], clipped[rows], case.mask[rows], buckets[rows], (0.1, 0.2))
        by_lag = engine_metrics(*policies, case.mask[rows], buckets[rows], level) | of_ratio
        return {name: metric for name, metric in by_lag.items() if not name.startswith("mismatch/")}

    tables = [t.tolist() for t in (case.old, case.rollout, case.mask, buckets, ratio, clipped)]
    expected = reference.metrics_by_lag(*tables, BUCKETS, level, 0.1, 0.2)
    for size in (6, 4, 1):
        parts = [metrics(rows) for rows in torch.arange(6).split(size)]
        found = to_floats(merge(parts))  # type: ignore[arg-type]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def loss_settings(mode: str, correction: CorrectionSettings | None) -> PolicyLossSettings:
    return PolicyLossSettings("token", 0.2, 0.28, None, mode, response_length=7, correction=correction)


def loss_and_gradient(case: Case, chosen: PolicyLossSettings) -> tuple[float, torch.Tensor]:
    log_probs = case.log_probs.clone().requires_grad_()
    loss, _ = policy_loss(log_probs, None, case.batch(), Denominators.of(case.mask), chosen)
    loss.backward()
    assert log_probs.grad is not None
    return float(loss.detach()), log_probs.grad


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("bound", [1.1, 1e9])
def test_recompute_with_token_weights_is_the_decoupled_objective(mode: str, bound: float) -> None:
    """AReaL clips the ratio of current to old policy, and weights by the ratio of old to behaviour policy."""
    case = random_case(5, batch=6, spread=0.5, gaps=True, weighted=True)
    assert case.rollout is not None
    case.weights = None
    correction = CorrectionSettings("token", "truncate", 0.0, bound)
    loss, gradient = loss_and_gradient(case, loss_settings(mode, correction))
    tables = [t.tolist() for t in (case.log_probs, case.old, case.rollout, case.advantages, case.mask)]
    expected, slope = reference.decoupled_objective(*tables, 0.2, 0.28, bound, mode)
    assert loss == pytest.approx(-expected, rel=1e-9)
    torch.testing.assert_close(gradient, -torch.tensor(slope, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_without_clip_and_bound_the_old_policy_cancels() -> None:
    """`pi / pi_old * pi_old / pi_behaviour`: the importance-weighted policy gradient, for any old policy."""
    case = random_case(8, batch=6, spread=0.01, gaps=True, weighted=True)
    assert case.rollout is not None
    correction = CorrectionSettings("token", "truncate", 0.0, 1e9)
    decoupled = loss_and_gradient(case, loss_settings("token-mean", correction))
    behaviour = replace(case, old=case.rollout)
    wide = replace(loss_settings("token-mean", None), clip_low=0.999, clip_high=1e9)
    coupled = loss_and_gradient(behaviour, wide)
    assert decoupled[0] == pytest.approx(coupled[0], rel=1e-9)
    torch.testing.assert_close(decoupled[1], coupled[1], rtol=1e-9, atol=1e-12)


def test_log_probs_of_the_engine_spend_the_clip_range_on_staleness() -> None:
    """A stale token is clipped before the policy has moved if the old log-probs are those of the rollout."""
    case = random_case(3, batch=4, spread=0.0)
    case.rollout, case.advantages = case.old - 0.5, case.advantages.abs()
    kept = loss_and_gradient(case, loss_settings("token-mean", None))[1]
    assert bool((kept[case.mask] != 0).all()), "the ratio to the recomputed old policy is 1"
    spent = loss_and_gradient(replace(case, old=case.rollout), loss_settings("token-mean", None))[1]
    assert float(spent.abs().max()) == 0, "the ratio to the rollout policy is exp(0.5) > 1.28"


def test_loss_reports_clip_and_ratio_of_each_lag_present() -> None:
    case, buckets = stale_case(2)
    batch = replace(case.batch(), lag_buckets=buckets)
    chosen = loss_settings("token-mean", None)
    _, plain = policy_loss(case.log_probs, None, case.batch(), Denominators.of(case.mask), chosen)
    _, metrics = policy_loss(case.log_probs, None, batch, Denominators.of(case.mask), chosen)
    found, without = to_floats(metrics), to_floats(plain)
    assert {name: found[name] for name in without} == without
    tokens = [int((case.mask & (buckets == index)).sum()) for index in range(len(BUCKETS))]
    fractions = [found[f"actor/clip_fraction_lag_{name}"] for name in BUCKETS]
    total = sum(n * f for n, f in zip(tokens, fractions, strict=True)) / sum(tokens)
    assert total == pytest.approx(found["actor/clip_fraction"])
    assert max(found[f"actor/ratio_max_lag_{name}"] for name in BUCKETS) == found["actor/ratio_max"]
    assert min(found[f"actor/ratio_min_lag_{name}"] for name in BUCKETS) == found["actor/ratio_min"]
    scaled = replace(chosen, importance_sampling="seq", pg_clip_length_scaling=True)
    _, metrics = policy_loss(case.log_probs, None, batch, Denominators.of(case.mask), scaled)
    assert "actor/clip_fraction_lag_0" in metrics and "actor/ratio_tail_lag_0" not in metrics
