"""Masked arithmetic: masking comes first, so that NaN or Inf at a masked position reaches no value and no gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def raised(values: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 are unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` with exact zeros (value and gradient) where the boolean `mask` of the same shape is false.

    Half precision is converted to float32; float32 and float64 are unchanged.
    """
    return torch.where(mask, raised(values), 0.0)


def masked_difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Return `a - b`, exactly 0 (value and gradient) where masked; dtypes are converted as in `zero_masked`."""
    return torch.where(mask, raised(a) - raised(b), 0.0)


def count_true(flags: Tensor) -> Tensor:
    """Return [B] int64: the number of true elements per row of the boolean `flags` [B, T]; exact up to 2^24."""
    # Summing bool is several times slower on CPU than converting bytes and summing floats.
    return flags.view(torch.uint8).float().sum(-1).long()
