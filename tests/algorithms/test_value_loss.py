import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import advantage_reference as reference
from reference.gspo_cases import random_case, sequences_of

from roll_gspo.algorithms.aggregate import LOSS_AGG_MODES, Denominators
from roll_gspo.algorithms.value_loss import ValueLossSettings, explained_variance, value_loss
from roll_gspo.batch import TrainBatch
from roll_gspo.metrics import merge, to_floats

MODES = sorted(LOSS_AGG_MODES)


def batch_of(old, returns, mask):
    nothing = torch.zeros_like(returns)
    rows = torch.arange(len(mask))
    return TrainBatch(sequences_of(mask), rows, nothing, nothing, nothing, values=old, returns=returns)


def random_batch(seed, size=5, width=7, dtype=torch.float64):
    """(values now, with gradient; the batch)."""
    case = random_case(seed, size, width, dtype=dtype)
    return case.log_probs.clone().requires_grad_(), batch_of(case.old, case.ref, case.mask)


def whole(values, batch, chosen):
    return value_loss(values, batch, Denominators.of(batch.response_mask), chosen)


def test_value_loss_hand_computed():
    # Errors 1, 4 and 9, and at the clip of 0.5: v 2 -> 1.5 against R 1 (0.25 < 1: unclipped stays the larger),
    # v 0 -> 1.5 against R 2 (0.25 < 4), v 3 -> 1.5 against R 0 (2.25 < 9).
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = torch.tensor([[2.0, 0.0, math.nan], [3.0, math.inf, 1.0]], requires_grad=True)
    old = torch.tensor([[1.0, 2.0, math.nan], [1.0, 0.0, math.inf]])
    batch = batch_of(old, torch.tensor([[1.0, 2.0, math.inf], [0.0, math.nan, 0.0]]), mask)
    plain, metrics = whole(values, batch, ValueLossSettings())
    assert float(plain.detach()) == pytest.approx(0.5 * 14 / 3)
    plain.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[1 / 3, -2 / 3, 0.0], [1.0, 0.0, 0.0]]))
    assert to_floats(metrics) == pytest.approx(
        {
            "critic/loss": 7 / 3,
            "critic/value_mean": 5 / 3,
            "critic/return_mean": 1.0,
            "critic/clip_fraction": 0.0,
        }
    )
    clipped, _ = whole(values, batch, ValueLossSettings(value_clip=0.5))
    torch.testing.assert_close(clipped, plain)


def test_value_loss_clip_takes_the_gradient_where_the_value_ran_ahead():
    # Old 0, clip 0.5. Token 1: v 1 = R, but only 0.5 counts: (0.5 - 1)^2, no gradient. Token 2: within the range.
    values = torch.tensor([[1.0, 0.25]], requires_grad=True)
    batch = batch_of(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    loss, metrics = whole(values, batch, ValueLossSettings(value_clip=0.5))
    assert float(loss.detach()) == pytest.approx(0.5 * (0.25 + 0.5625) / 2)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.375]]))
    assert to_floats(metrics)["critic/clip_fraction"] == 0.5


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 7),
    width=st.integers(1, 6),
    mode=st.sampled_from(MODES),
    value_clip=st.sampled_from([None, 0.05, 0.3]),
)
def test_value_loss_equals_the_reference(seed, size, width, mode, value_clip):
    values, batch = random_batch(seed, size, width)
    ours, metrics = whole(values, batch, ValueLossSettings(value_clip, mode, 11))
    mask = batch.response_mask
    tables = [x.tolist() for x in (values.detach(), batch.values, batch.returns, mask)]
    errors = reference.value_errors(*tables, value_clip)
    assert float(ours.detach()) == pytest.approx(reference.value_loss(errors, mode, 11), rel=1e-9)
    floats = to_floats(metrics)
    assert floats["critic/return_mean"] == pytest.approx(float(batch.returns[mask].mean()))
    assert floats["critic/value_mean"] == pytest.approx(float(values.detach()[mask].mean()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_value_loss_gradcheck(mode, value_clip):
    values, batch = random_batch(4, 4, 5)
    chosen = ValueLossSettings(value_clip, mode, 9)
    assert torch.autograd.gradcheck(lambda v: whole(v, batch, chosen)[0], values)


@pytest.mark.parametrize("mode", MODES)
def test_value_loss_does_not_depend_on_micro_batches_order_or_padding(mode):
    values, batch = random_batch(6, 7, 8, torch.float32)
    chosen = ValueLossSettings(0.2, mode, 9)
    loss, metrics = whole(values, batch, chosen)
    (gradient,) = torch.autograd.grad(loss, values)
    denominators = Denominators.of(batch.response_mask)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    for size in (1, 2, 3, 7):
        parts, total = [], torch.zeros(())
        for index in order.split(size):
            piece = batch.rows(index)
            share, part = value_loss(values[index, : piece.response_mask.shape[1]], piece, denominators, chosen)
            total = total + share
            parts.append(part)
        torch.testing.assert_close(total, loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(total, values)[0], gradient, rtol=1e-6, atol=1e-6)
        assert to_floats(merge(parts)) == pytest.approx(to_floats(metrics), rel=1e-5)
    wide = {
        name: torch.nn.functional.pad(batch.__dict__[name], (0, 5), value=math.nan) for name in ("values", "returns")
    }
    padded = replace(batch, sequences=sequences_of(torch.nn.functional.pad(batch.response_mask, (0, 5))), **wide)
    again, _ = value_loss(torch.nn.functional.pad(values, (0, 5), value=math.nan), padded, denominators, chosen)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(again, values)[0], gradient, rtol=1e-6, atol=1e-6)


def test_value_loss_of_half_precision_is_float32():
    values, batch = random_batch(3, dtype=torch.bfloat16)
    loss, _ = whole(values, batch, ValueLossSettings(0.2))
    single = whole(
        values.detach().float(),
        replace(batch, values=batch.values.float(), returns=batch.returns.float()),
        ValueLossSettings(0.2),
    )[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, single)


def test_value_loss_without_a_token_is_zero_with_zero_gradient():
    values = torch.full((2, 3), math.nan, requires_grad=True)
    batch = batch_of(torch.full((2, 3), math.nan), torch.full((2, 3), math.inf), torch.zeros(2, 3, dtype=torch.bool))
    loss, metrics = whole(values, batch, ValueLossSettings(0.2))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(values.grad, torch.zeros(2, 3))
    assert set(to_floats(metrics).values()) == {0.0}


def test_value_loss_refuses_what_is_missing():
    values, batch = random_batch(0)
    with pytest.raises(ValueError, match="the batch has no returns"):
        whole(values, replace(batch, returns=None), ValueLossSettings())
    with pytest.raises(ValueError, match="value_clip: the batch has no values"):
        whole(values, replace(batch, values=None), ValueLossSettings(0.2))


def test_explained_variance_hand_computed():
    mask = torch.tensor([[True, True, False], [True, True, False]])
    returns = torch.tensor([[1.0, 3.0, math.nan], [5.0, 7.0, math.inf]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((2, 3), 9.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    # A constant offset is no error of the spread.
    assert explained_variance(returns + 100, returns, mask) == pytest.approx(1.0)
    assert explained_variance(returns, torch.ones(2, 3), mask) == 0.0
    assert explained_variance(returns, returns, torch.zeros(2, 3, dtype=torch.bool)) == 0.0


def test_explained_variance_equals_the_reference():
    for seed in range(5):
        case = random_case(seed)
        ours = explained_variance(case.old, case.ref, case.mask)
        assert ours == pytest.approx(
            reference.explained_variance(case.old[case.mask].tolist(), case.ref[case.mask].tolist())
        )
