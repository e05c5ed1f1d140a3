"""A time limit for calls that have none, such as the start of NCCL."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from roll_gspo.errors import WeightTransferError

ResultT = TypeVar("ResultT")


def within(seconds: float, doing: str, call: Callable[[], ResultT], device: int | None = None) -> ResultT:
    """Return the result of `call`, which runs in another thread.

    A call that exceeds the limit cannot be ended. Its thread remains until the process ends.

    Args:
        seconds: the limit.
        doing: what the call does, for the error.
        call: the call.
        device: index of the thread's current device; None keeps the default.

    Raises:
        WeightTransferError: the limit was exceeded.
    """
    results: list[ResultT] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if device is not None:
                torch.accelerator.set_device_index(device)
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name=doing)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise WeightTransferError(f"weight transfer: could not {doing} within {seconds:g} s")
    return results[0]
