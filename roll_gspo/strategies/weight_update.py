"""The kinds of weight update: what the tensors are that a trainer sends."""

from __future__ import annotations

import torch
from torch import Tensor

from roll_gspo.errors import WeightTransferError

FULL_MODEL = "full"
"""All tensors of the model under their Hugging Face names, each once."""

PROBE = "probe"
"""One known tensor, sent when the members connect. It changes no weight and shows that the backend delivers bytes."""

CONNECTING = -1
"""Stands for the version while members connect."""


def probe_tensor(device: torch.device | str = "cpu") -> Tensor:
    """Return the tensor of a `PROBE`, [4096] float32."""
    return torch.arange(4096, dtype=torch.float32, device=device) + 0.5


def check_kind(kind: str) -> None:
    """Check that an engine can apply a kind of update. A kind that changes only some tensors gets its own name.

    Raises:
        WeightTransferError: the kind is unknown here.
    """
    if kind != FULL_MODEL:
        raise WeightTransferError(
            f"weight transfer: updates of kind '{kind}' are unknown to this engine, which takes '{FULL_MODEL}'; run "
            "trainer and engines with the same version of roll_gspo"
        )
