"""What every role with a trained policy does with its engine's state."""

from __future__ import annotations

from pathlib import Path

from roll_gspo.strategies.base import TrainStrategy


class TrainedRole:
    """A role around an engine that trains.

    Args:
        strategy: the engine that holds the model and its optimizer.
    """

    def __init__(self, strategy: TrainStrategy) -> None:
        self._strategy = strategy

    def save(self, folder: Path, asynchronous: bool = False) -> None:
        """Write the training state into an empty folder; `asynchronous`: go on meanwhile, `finish_save` ends it."""
        self._strategy.save(folder, asynchronous)

    def finish_save(self, wait: bool = True) -> bool:
        """Whether what `save` began is complete; `wait` until it is."""
        return self._strategy.finish_save(wait)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote."""
        self._strategy.load(folder)

    def save_hf(self, folder: Path) -> None:
        """Write the model in Hugging Face layout."""
        self._strategy.save_hf(folder)

    def close(self) -> None:
        """The engine lives as long as the process."""
