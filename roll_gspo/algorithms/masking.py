"""Masks first, arithmetic second: NaN or Inf in a masked position reaches neither a value nor a gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def raised(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with exact zeros (value and gradient) where the boolean `mask` of the same shape is false.

    Half precision is raised to float32; float32 and float64 stay as they are.
    """
    return torch.where(mask, raised(values), 0.0)


def masked_difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """`a - b`, exactly 0 (value and gradient) where masked; raised like `zero_masked`."""
    return torch.where(mask, raised(a) - raised(b), 0.0)


def count_true(flags: Tensor) -> Tensor:
    """[B] int64, how many of each row of the boolean `flags` [B, T] are true; exact up to 2^24 a row."""
    # Summing bool is several times slower on CPU than converting bytes and summing floats.
    return flags.view(torch.uint8).float().sum(-1).long()
