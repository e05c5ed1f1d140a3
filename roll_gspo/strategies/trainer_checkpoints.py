"""Checkpoints and residency of an engine whose training state is owned by its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, TypeVar

from roll_gspo.strategies.base import Checkpointable
from roll_gspo.strategies.offload import Offloadable
from roll_gspo.strategies.residency import Residency

TrainerT = TypeVar("TrainerT", bound=Checkpointable)


class TrainerCheckpoints(Offloadable, Generic[TrainerT]):
    """Saves and loads the state of `self._trainer`: parameters, optimizer, applied steps and RNG states.

    The state must be on the device, so a checkpoint does not depend on residency.
    """

    _trainer: TrainerT

    def save(self, folder: Path, asynchronous: bool = False) -> None:
        """Write the state into an empty folder; see `Checkpointable.save`.

        Raises:
            CheckpointError: the state, or that of an earlier asynchronous save, cannot be written.
            ResidencyError: the state is offloaded.
        """
        self._state.need(Residency.FULL, "save")
        self._trainer.save(folder, asynchronous)

    def finish_save(self, wait: bool = True) -> bool:
        """Return whether the last `save` is complete; block until it is if `wait`.

        Raises:
            CheckpointError: the state cannot be written.
        """
        return self._trainer.finish_save(wait)

    def load(self, folder: Path) -> None:
        """Load a state that `save` wrote.

        Raises:
            CheckpointError: there is no state, it is damaged, or it is of another model.
            ResidencyError: the state is offloaded.
        """
        self._state.need(Residency.FULL, "load")
        self._trainer.load(folder)
