from __future__ import annotations

import logging

import pytest
import torch

from roll_gspo.batch import Completion, Prompt, Rollouts
from roll_gspo.errors import WeightTransferError
from roll_gspo.pipelines.rlvr.transfer_check import TOLERANCE, check_transfer
from roll_gspo.strategies.base import Sampling

SAMPLING = Sampling(num_samples=1, max_new_tokens=4)
ROLLOUTS = Rollouts.collate(
    [Prompt((1,), "a", {})] * 2,
    [[Completion((5, 6), (-1.0, -2.0), "stop")], [Completion((7,), (-3.0,), "stop")]],
    pad=0,
    weights_version=0,
)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rounding_passes_and_another_policy_does_not(dtype: str) -> None:
    own = ROLLOUTS.rollout_log_probs + 0.5 * TOLERANCE[dtype]
    check_transfer(ROLLOUTS, own, SAMPLING, dtype)
    with pytest.raises(WeightTransferError, match="does not compute with the trainer's weights"):
        check_transfer(ROLLOUTS, own + TOLERANCE[dtype], SAMPLING, dtype)


def test_not_a_number_does_not_pass() -> None:
    with pytest.raises(WeightTransferError):
        check_transfer(ROLLOUTS, torch.full_like(ROLLOUTS.rollout_log_probs, torch.nan), SAMPLING, "fp32")


def test_padding_does_not_count() -> None:
    own = torch.where(ROLLOUTS.sequences.response_mask, ROLLOUTS.rollout_log_probs, 1e9)
    check_transfer(ROLLOUTS, own, SAMPLING, "fp32")


@pytest.mark.parametrize("cut", [Sampling(1, 4, top_p=0.9), Sampling(1, 4, top_k=5)])
def test_cut_distribution_is_not_compared_and_that_is_logged(cut: Sampling, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "roll_gspo"):
        check_transfer(ROLLOUTS, ROLLOUTS.rollout_log_probs + 1, cut, "fp32")
    assert "weight transfer not checked" in caplog.text


def test_coarser_of_the_two_dtypes_decides() -> None:
    own = ROLLOUTS.rollout_log_probs + 0.01
    check_transfer(ROLLOUTS, own, SAMPLING, "fp32", "bf16")
    with pytest.raises(WeightTransferError, match=r"differ from the generation engine's by 0\.01 nats"):
        check_transfer(ROLLOUTS, own, SAMPLING, "fp32", "fp32")
