"""The device of the engines in this process."""

from __future__ import annotations

import torch

from roll_gspo.batch import Sequences


def local_device() -> torch.device:
    """The current CUDA device, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def move(sequences: Sequences, device: torch.device) -> Sequences:
    """The same samples on `device`."""
    return Sequences(
        sequences.input_ids.to(device),
        sequences.prompt_lengths.to(device),
        sequences.response_mask.to(device),
    )
