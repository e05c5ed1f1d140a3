import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gspo_reference as reference

from roll_gspo.algorithms.kl import KL_ESTIMATORS, kl_controller, kl_estimate

KINDS = sorted(KL_ESTIMATORS)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kl", [0.5, -1.0]),
        ("abs", [0.5, 1.0]),
        ("mse", [0.125, 0.5]),
        ("k3", [math.exp(-0.5) - 0.5, math.e - 2]),
    ],
)
def test_kl_hand_computed(kind, expected):
    estimate = kl_estimate(
        torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]]), torch.ones(1, 2, dtype=torch.bool), kind
    )
    torch.testing.assert_close(estimate, torch.tensor([expected]))


@settings(max_examples=60, deadline=None)
@given(d=st.floats(-60, 60), kind=st.sampled_from(KINDS))
def test_kl_equals_the_reference(d, kind):
    estimate = KL_ESTIMATORS[kind](torch.tensor(d, dtype=torch.float64))
    assert float(estimate) == pytest.approx(reference.kl(d, kind), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("d", [-400.0, -50.0, 50.0, 400.0])
def test_kl_k3_is_clamped_with_a_finite_gradient(d):
    difference = torch.tensor(d, requires_grad=True)
    estimate = KL_ESTIMATORS["k3"](difference)
    estimate.backward()
    assert float(estimate.detach()) == 10.0
    assert float(difference.grad) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_kl_masked_garbage_is_exactly_zero(kind):
    log_probs = torch.tensor([[-1.0, math.nan, math.inf]], requires_grad=True)
    reference_log_probs = torch.tensor([[-1.25, 0.0, math.inf]])
    mask = torch.tensor([[True, False, False]])
    estimate = kl_estimate(log_probs, reference_log_probs, mask, kind)
    estimate.sum().backward()
    assert estimate[0, 1:].tolist() == [0.0, 0.0]
    assert log_probs.grad[0, 1:].tolist() == [0.0, 0.0]
    assert float(log_probs.grad[0, 0]) != 0.0


def test_kl_controller_fixed_stays():
    controller = kl_controller(0.2, None, 10_000)
    controller.update(5.0, 64)
    assert controller.kl_coef == 0.2


def test_kl_controller_adaptive_hand_computed():
    controller = kl_controller(0.2, target_kl=0.1, kl_horizon=1000)
    controller.update(0.11, 100)
    assert controller.kl_coef == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    controller.update(9.0, 100)
    assert controller.kl_coef == pytest.approx(0.2 * 1.01 * (1 + 0.2 * 0.1))
    controller.update(0.0, 100)
    assert controller.kl_coef == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)


def test_kl_controller_adaptive_resumes():
    controller = kl_controller(0.2, 0.1, 1000)
    controller.update(0.3, 50)
    resumed = kl_controller(0.2, 0.1, 1000)
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    controller.update(0.05, 50)
    resumed.update(0.05, 50)
    assert resumed.kl_coef == controller.kl_coef != 0.2
