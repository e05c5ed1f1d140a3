"""Check on the first rollout that trainer and generation engine compute the same policy."""

from __future__ import annotations

import logging
from typing import NamedTuple

from torch import Tensor

from roll_gspo.algorithms.correction import mismatch_metrics
from roll_gspo.batch import Rollouts
from roll_gspo.errors import WeightTransferError
from roll_gspo.metrics import to_floats
from roll_gspo.strategies.base import Sampling

logger = logging.getLogger(__name__)

# Mean |difference| of log-probs (nats). With equal weights it is rounding error: measured about 1e-5 in float32 and
# 1e-2 in bfloat16. One stale tensor of a trained model exceeds these bounds by far.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.15, "fp16": 0.05}


class Mismatch(NamedTuple):
    """Difference of trainer and generation engine at equal weights, over response tokens.

    Attributes:
        kl: KL(generation engine || trainer) in nats per token, k3 estimate.
        mean: mean |difference of log-probs|.
        largest: largest |difference of log-probs|.
    """

    kl: float
    mean: float
    largest: float


def check_transfer(rollouts: Rollouts, trainer_log_probs: Tensor, sampling: Sampling, *dtypes: str) -> Mismatch | None:
    """Compare the log-probs of the rollout's tokens from trainer and generation engine; return their difference.

    `dtypes` are the compute dtypes of the two. With top-p or top-k the check is skipped, because the engine's
    log-probs belong to a truncated distribution; the result is then None.

    Raises:
        WeightTransferError: they differ by more than rounding explains.
    """
    if sampling.top_p < 1 or sampling.top_k > 0:
        logger.info("weight transfer not checked: top_p/top_k make the engine's log-probs differ by design")
        return None
    mask = rollouts.sequences.response_mask
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    policies = trainer_log_probs.double(), rollouts.rollout_log_probs.double()
    found = to_floats(mismatch_metrics(*policies, mask))
    kl, mean, largest = (found[f"mismatch/{name}"] for name in ("kl", "log_prob_diff_mean", "log_prob_diff_max"))
    if not mean <= tolerance:
        raise WeightTransferError(
            "after the first weight transfer the trainer's log-probs differ from the generation engine's by "
            f"{mean:.3g} nats on average ({largest:.3g} at most), where rounding explains {tolerance:g}: the "
            "engine does not compute with the trainer's weights; please report this with the versions of both "
            "engines"
        )
    logger.info(
        "weight transfer checked: log-probs differ by %.2g on average, %.2g at most, KL %.2g", mean, largest, kl
    )
    return Mismatch(kl, mean, largest)
