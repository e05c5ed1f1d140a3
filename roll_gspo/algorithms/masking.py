"""Masks first, arithmetic second: NaN or Inf in a masked position reaches neither a value nor a gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with exact zeros (value and gradient) where the boolean `mask` of the same shape is false.

    Half precision is raised to float32; float32 and float64 stay as they are.
    """
    raised = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(mask, raised, torch.zeros_like(raised))


def masked_difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """`a - b`, exactly 0 where masked; raised like `zero_masked`."""
    return zero_masked(a, mask) - zero_masked(b, mask)
