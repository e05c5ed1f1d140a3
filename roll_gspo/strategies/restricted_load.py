"""Loading of torch files that somebody else may have written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO, Any

import torch

from roll_gspo.errors import CheckpointError


def load_restricted(path: Path, file: IO[bytes] | None = None) -> Any:
    """Load tensors and plain values of a file to host memory; anything else in it is an error, and no code runs.

    Args:
        path: the file.
        file: a part of the file to read instead of the whole.

    Raises:
        CheckpointError: the file is missing, damaged, or refers to code.
    """
    try:
        return torch.load(path if file is None else file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and crafted pickles raise many types
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> CheckpointError:
    """Return the error of a file that cannot be read, with the cause in one line."""
    text = str(error).strip() or type(error).__name__
    # torch's whole text recommends to load the file without restrictions.
    cause = re.search(r"WeightsUnpickler error:\s*(.*?)(?:\. Please|$)", text, re.MULTILINE)
    return CheckpointError(
        f"{path}: cannot be read ({cause[1] if cause else text.splitlines()[0]}); choose another checkpoint"
    )
