"""Comparison of the experts that two passes through a mixture-of-experts model activate for the same tokens.

Legend: B samples, S positions, N counted positions, L layers with a router, K experts per token. Experts are numbered;
-1 means not recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roll_gspo.metrics import Metric


@torch.no_grad()
def expert_difference(experts: Tensor, others: Tensor, positions: Tensor) -> Metric:
    """Return the fraction of activated experts that differ between two passes over the same tokens.

    An expert of `experts` differs if the same layer did not choose it for the same token in `others`. The order of the
    K experts does not matter.

    Args:
        experts, others: [B, S, L, K] integers, K distinct ones per token and layer.
        positions: [B, S] bool, the counted positions (`Sequences.predicting_mask`). Positions that one of the two
            passes did not record are never counted.

    Returns:
        A mean over positions, layers and experts.
    """
    # all positions, because an index of unknown length would wait for the device
    recorded = (experts >= 0).all(-1) & (others >= 0).all(-1) & positions[:, :, None]
    shared = torch.zeros_like(experts, dtype=torch.bool)
    for choice in others.unbind(-1):  # comparing [B, S, L, K, K] at once would need K times the memory
        shared |= experts == choice[..., None]
    differing = (~shared & recorded[..., None]).sum()
    return Metric(differing.double(), recorded.sum() * experts.shape[-1])
