import math
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gspo_reference as reference
from reference import policy_reference
from reference.gspo_cases import random_case

from roll_gspo.algorithms.correction import (
    CORRECTION_LEVELS,
    CORRECTION_MODES,
    CorrectionSettings,
    correction_weights,
    mismatch_metrics,
)
from roll_gspo.metrics import merge, to_floats

MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])


def test_mismatch_of_equal_log_probs_is_none():
    log_probs = torch.where(MASK, -1.0, math.nan)
    assert to_floats(mismatch_metrics(log_probs, log_probs, MASK)) == {
        "mismatch/log_prob_diff_mean": 0.0,
        "mismatch/log_prob_diff_max": 0.0,
        "mismatch/kl": 0.0,
        "mismatch/ess": 1.0,
    }


def test_mismatch_hand_computed():
    rollout = torch.zeros(3, 3)
    old = torch.tensor([[0.1, -0.3, math.inf], [0.0, 0.0, 0.4], [math.nan] * 3])
    figures = to_floats(mismatch_metrics(old, rollout, MASK))
    weights = [math.exp(-0.2), math.exp(0.4)]
    k3 = sum(math.exp(d) - 1 - d for d in (0.1, -0.3, 0.4)) / 5
    assert figures["mismatch/log_prob_diff_mean"] == pytest.approx(0.8 / 5)
    assert figures["mismatch/log_prob_diff_max"] == pytest.approx(0.4)
    assert figures["mismatch/kl"] == pytest.approx(k3, rel=1e-5)
    assert figures["mismatch/ess"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / 2)


def test_mismatch_ess_equals_the_reference_and_survives_extremes():
    case = random_case(4, batch=6, width=9, spread=2.0)
    figures = to_floats(mismatch_metrics(case.log_probs, case.old, case.mask))
    expected = reference.effective_sample_fraction(case.log_probs.tolist(), case.old.tolist(), case.mask.tolist())
    assert figures["mismatch/ess"] == pytest.approx(expected, rel=1e-6)
    extreme = to_floats(mismatch_metrics(torch.full((3, 3), -900.0), torch.zeros(3, 3), MASK))
    assert all(math.isfinite(value) for value in extreme.values())
    assert extreme["mismatch/ess"] == 1.0  # both weights sit at the clamp, not at 0


def test_mismatch_of_an_empty_batch_counts_nothing():
    nothing = mismatch_metrics(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    one_sample = mismatch_metrics(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))
    assert to_floats(merge([nothing, one_sample]))["mismatch/ess"] == 1.0


# Row 0: d = (0.5, -1.5); row 1: (0, 0.3, 0.6); row 2 has no token.
OLD = torch.tensor([[0.5, -1.5, math.nan], [0.0, 0.3, 0.6], [math.inf, math.nan, 0.0]])
ROLLOUT = torch.tensor([[0.0, 0.0, math.inf], [0.0] * 3, [math.inf, 0.0, math.nan]])


@pytest.mark.parametrize(
    ("level", "plain"),
    [
        ("token", [[0.5, -1.5], [0.0, 0.3, 0.6]]),
        ("geometric", [[-0.5] * 2, [0.3] * 3]),
        ("sequence", [[-1.0] * 2, [0.9] * 3]),
    ],
)
@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_correction_hand_computed(level, plain, mode):
    low, high = 0.5, 1.5
    chosen = CorrectionSettings(level, mode, low, high)
    weights, metrics = correction_weights(OLD, ROLLOUT, MASK, chosen)
    ratios = [[math.exp(d) for d in line] for line in plain]
    if mode == "truncate":
        expected = [[min(max(w, low), high) for w in line] for line in ratios]
    else:
        expected = [[w if low <= w <= high else 0.0 for w in line] for line in ratios]
    torch.testing.assert_close(weights, torch.tensor([[*expected[0], 1.0], expected[1], [1.0] * 3]))
    flat, before = (list(chain.from_iterable(table)) for table in (expected, ratios))
    figures = to_floats(metrics)
    assert figures["correction/weight_mean"] == pytest.approx(sum(flat) / 5)
    assert figures["correction/raw_weight_mean"] == pytest.approx(sum(before) / 5)
    assert figures["correction/raw_weight_max"] == pytest.approx(max(before))
    assert figures["correction/bounded_fraction"] == pytest.approx(
        sum(not math.isclose(a, b) for a, b in zip(flat, before, strict=True)) / 5
    )


def test_correction_default_bounds_are_those_of_truncated_importance_sampling():
    weights, _ = correction_weights(OLD, ROLLOUT + 2, MASK, CorrectionSettings("token", "truncate"))
    assert float(weights[0, 1]) == pytest.approx(math.exp(-3.5))  # no lower bound
    weights, _ = correction_weights(OLD, ROLLOUT - 2, MASK, CorrectionSettings("token", "truncate"))
    assert float(weights[1].min()) == 2.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 5),
    width=st.integers(1, 8),
    spread=st.sampled_from([0.0, 1e-3, 0.5, 9.0]),
    level=st.sampled_from(sorted(CORRECTION_LEVELS)),
    mode=st.sampled_from(sorted(CORRECTION_MODES)),
    bounds=st.sampled_from([(0.0, 2.0), (0.5, 1.5), (0.999, 1.001)]),
)
def test_correction_equals_the_reference(seed, batch, width, spread, level, mode, bounds):
    case = random_case(seed, batch, width, spread, gaps=True)
    weights, _ = correction_weights(case.log_probs, case.old, case.mask, CorrectionSettings(level, mode, *bounds))
    tables = [t.tolist() for t in (case.log_probs, case.old, case.mask)]
    expected = policy_reference.correction(*tables, level, mode, *bounds)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("level", CORRECTION_LEVELS)
@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_correction_is_a_constant_and_stays_finite(level, mode):
    old = torch.full((1, 3), -400.0, requires_grad=True)
    chosen = CorrectionSettings(level, mode, 0.0, 1e12)
    for rollout in (torch.zeros(1, 3), torch.full((1, 3), -800.0)):
        weights, metrics = correction_weights(old, rollout, MASK[1:2], chosen)
        assert bool(weights.isfinite().all())
        assert not weights.requires_grad
        assert not any(metric.value.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("level", CORRECTION_LEVELS)
@pytest.mark.parametrize("mode", CORRECTION_MODES)
def test_correction_of_equal_log_probs_is_one(level, mode):
    weights, metrics = correction_weights(ROLLOUT, ROLLOUT, MASK, CorrectionSettings(level, mode, 0.9, 1.1))
    assert torch.equal(weights, torch.ones(3, 3))
    ones = dict.fromkeys(("weight_mean", "raw_weight_mean", "raw_weight_max"), 1.0)
    assert to_floats(metrics) == {f"correction/{name}": x for name, x in (ones | {"bounded_fraction": 0.0}).items()}
