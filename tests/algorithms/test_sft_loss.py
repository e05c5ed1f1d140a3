"""The supervised loss: by hand, against a double loop in float64, and whatever the mini-batch is cut into."""

from __future__ import annotations

import math

import pytest
import torch

from roll_gspo.algorithms.aggregate import Denominators
from roll_gspo.algorithms.sft_loss import negative_log_likelihood, sft_loss
from roll_gspo.metrics import merge, to_floats


def case(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [7, 9] with NaN where masked, and masks with gaps and one empty sample."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(7, 9, generator=generator) < 0.6
    mask[3] = False
    log_probs = -torch.rand(7, 9, generator=generator, dtype=torch.float64) * 5
    return log_probs.masked_fill(~mask, math.nan), mask


def test_loss_is_the_mean_over_all_tokens_of_the_mini_batch() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, math.nan], [-6.0, math.nan, math.inf]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss, metrics = sft_loss(log_probs, mask, Denominators.of(mask))
    assert float(loss) == 3.0, "(1 + 2 + 6) / 3, not the mean of the means 1.5 and 6"
    assert to_floats(metrics) == {"sft/loss": 3.0, "sft/num_tokens": 3.0}
    loss.backward()
    assert log_probs.grad is not None
    assert torch.equal(log_probs.grad, -mask.float() / 3)
    assert negative_log_likelihood(log_probs, mask) == (9.0, 3)


@pytest.mark.parametrize("seed", range(3))
def test_loss_agrees_with_a_loop_in_float64(seed: int) -> None:
    log_probs, mask = case(seed)
    terms = [-float(log_probs[i, t]) for i in range(7) for t in range(9) if mask[i, t]]
    loss, _ = sft_loss(log_probs, mask, Denominators.of(mask))
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    in_float32, _ = sft_loss(log_probs.float(), mask, Denominators.of(mask))
    assert float(in_float32) == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    assert negative_log_likelihood(log_probs, mask) == (pytest.approx(sum(terms)), len(terms))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_loss_and_gradient_do_not_depend_on_the_cut(size: int) -> None:
    log_probs, mask = case(7)
    denominators = Denominators.of(mask)
    whole = log_probs.clone().requires_grad_()
    expected, _ = sft_loss(whole, mask, denominators)
    expected.backward()
    # in pieces, in another order, with more padding
    order = torch.randperm(7, generator=torch.Generator().manual_seed(size))
    wide = torch.nn.functional.pad(log_probs, (0, 4), value=math.nan).requires_grad_()
    wide_mask = torch.nn.functional.pad(mask, (0, 4))
    parts = [sft_loss(wide[index], wide_mask[index], denominators) for index in order.split(size)]
    torch.stack([share for share, _ in parts]).sum().backward()
    assert whole.grad is not None and wide.grad is not None
    assert to_floats(merge(metrics for _, metrics in parts))["sft/loss"] == pytest.approx(float(expected), rel=1e-12)
    torch.testing.assert_close(wide.grad[:, :9], whole.grad, atol=1e-15, rtol=0)


def test_mini_batch_without_a_token_has_no_loss() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss, metrics = sft_loss(torch.full((2, 3), math.nan), mask, Denominators.of(mask))
    assert float(loss) == 0 and to_floats(metrics)["sft/num_tokens"] == 0
