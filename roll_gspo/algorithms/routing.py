"""How far the experts of a mixture-of-experts model are from one another on the same tokens.

Legend: B samples, S positions, N positions that count, L layers with a router, K experts a token. Experts are numbered;
-1 is not recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roll_gspo.metrics import Metric


@torch.no_grad()
def expert_difference(experts: Tensor, others: Tensor, positions: Tensor) -> Metric:
    """The share of activated experts that differ between two passes over the same tokens.

    An expert of `experts` differs where the same layer did not choose it for the same token in `others`; the order
    among the K does not matter.

    Args:
        experts, others: [B, S, L, K] integers, K different ones a token and layer.
        positions: [B, S] bool, those that count (`Sequences.predicting_mask`: what a token is predicted from); where
            one of the two recorded nothing never does.

    Returns:
        A mean over positions, layers and experts.
    """
    ours, theirs = experts[positions], others[positions]
    recorded = (ours >= 0).all(-1) & (theirs >= 0).all(-1)
    shared = torch.zeros_like(ours, dtype=torch.bool)
    for choice in theirs.unbind(-1):  # K times; [N, L, K, K] at once would be K times the memory of a rollout
        shared |= ours == choice[..., None]
    differing = (~shared & recorded[..., None]).sum()
    return Metric(differing.double(), recorded.sum() * experts.shape[-1])
