import math

import pytest
import torch
from reference import gspo_reference as reference
from reference.gspo_cases import random_case

from roll_gspo.algorithms.correction import mismatch_metrics
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
