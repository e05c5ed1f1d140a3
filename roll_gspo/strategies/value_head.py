"""The value head of a critic, common to all engines: a scalar output instead of logits.

Legend: H hidden, B samples, T response positions (see `roll_gspo.batch`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from roll_gspo.batch import Sequences
from roll_gspo.strategies.base import TokenScores
from roll_gspo.strategies.log_probs import score_in_micro_batches


class ValueHead(torch.nn.Module):
    """Hidden states [..., H] -> values [..., 1].

    Weights start at 0, and so do all values. Initialisation is not random, and the first advantages are those without a
    critic. Only the head has a gradient in the first optimizer step; the trunk follows. Weights and arithmetic are
    float32 for any dtype of the trunk, because a value is a small difference of many products.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the value of every hidden state."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight)


def values_in_micro_batches(
    sequences: Sequences, micro_batch_size: int, forward: Callable[[Sequences], Tensor]
) -> Tensor:
    """Return [B, T] float32 values on the CPU, computed by `forward` on trimmed micro-batches of similar length."""
    # micro-batches, order and padding as for log-probs
    scored = score_in_micro_batches(sequences, micro_batch_size, lambda part: TokenScores(forward(part), None))
    return scored.log_probs
