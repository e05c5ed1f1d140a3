"""The device of the engines in this process."""

from __future__ import annotations

import torch

from roll_gspo.batch import Sequences, moved


def local_device() -> torch.device:
    """Return the current CUDA device, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def used_device_bytes() -> int | None:
    """Return the memory in use on the current CUDA device, by all processes; None if there is no such device."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def move(sequences: Sequences, device: torch.device) -> Sequences:
    """Return the same samples on `device`."""
    return Sequences(*moved((sequences.input_ids, sequences.prompt_lengths, sequences.response_mask), device))
