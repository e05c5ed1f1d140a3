"""The value head of a critic: a scalar instead of the logits; common to all engines.

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

    The weights start at 0, and so do all values: nothing is random, and the first advantages are those without a
    critic. In the first optimizer step the head alone has a gradient, later the trunk too. Weights and arithmetic are
    float32 whatever the trunk computes in, for a value is a small difference of many products.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """The value of every hidden state."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight)


def values_in_micro_batches(
    sequences: Sequences, micro_batch_size: int, forward: Callable[[Sequences], Tensor]
) -> Tensor:
    """[B, T] float32 on the CPU: what `forward` says of trimmed pieces of samples that are about equally long."""
    # pieces, order and padding are those of log-probabilities
    scored = score_in_micro_batches(sequences, micro_batch_size, lambda part: TokenScores(forward(part), None))
    return scored.log_probs
