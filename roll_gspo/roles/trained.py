"""Trained roles: they save and load the state of their engine."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, TypeVar

from roll_gspo.roles.profiled import ProfiledRole
from roll_gspo.roles.shared_devices import ResidentRole
from roll_gspo.strategies.base import Checkpointable, TrainStrategy

StrategyT = TypeVar("StrategyT", bound=Checkpointable)


class TrainedRole(ProfiledRole, ResidentRole, Generic[StrategyT]):
    """A role whose engine trains a model.

    Args:
        strategy: the engine that holds the model and its optimizer.
    """

    def __init__(self, strategy: StrategyT) -> None:
        self._strategy: StrategyT = strategy

    def save(self, folder: Path, asynchronous: bool = False) -> None:
        """Write the training state into an empty folder; see `Checkpointable.save`."""
        self._strategy.save(folder, asynchronous)

    def finish_save(self, wait: bool = True) -> bool:
        """Return whether the last `save` is complete; see `Checkpointable.finish_save`."""
        return self._strategy.finish_save(wait)

    def load(self, folder: Path) -> None:
        """Load a state that `save` wrote."""
        self._strategy.load(folder)

    def close(self) -> None:
        """Do nothing: the engine lives as long as the process."""


class TrainedPolicy(TrainedRole[TrainStrategy]):
    """A trained role that holds a language model."""

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout."""
        self._strategy.save_hf(folder)
