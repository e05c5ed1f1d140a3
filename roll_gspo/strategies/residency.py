"""Parts of an engine's state that stay in device memory while other engines use the device."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Protocol, runtime_checkable


class Phase(StrEnum):
    """Uses of shared devices, in the order of a step."""

    GENERATING = "generating"
    SCORING = "scoring"
    TRAINING = "training"
    SYNCING = "syncing"


class Residency(IntEnum):
    """Part of an engine's state in device memory; a larger value includes the smaller ones.

    The rest is in host memory, or is dropped if it can be built again (a KV cache, gradients between updates, the
    weights of a generation engine that a trainer replaces before they are used).
    """

    OFFLOADED = 0
    """Nothing but small state, such as random-number generators."""
    WEIGHTS = 1
    """The weights: a model that scores or is exported, or a generation engine that receives weights."""
    FULL = 2
    """Everything: a trainer with gradients and optimizer state, or a generation engine with its KV cache."""


@runtime_checkable
class OffloadableEngine(Protocol):
    """An engine that can leave the device and return."""

    @property
    def residency(self) -> Residency:
        """Part of the state that is in device memory now."""
        ...

    def reside(self, residency: Residency) -> None:
        """Move state until exactly the part `residency` is in device memory; no-op if it is already.

        Values do not change, and references to parameters stay valid. If a move fails, `residency` is the largest part
        that is complete on the device. If several ranks share the model, all of them call it.

        Raises:
            ResidencyError: a move failed, for example because device or host memory is exhausted.
        """
        ...
