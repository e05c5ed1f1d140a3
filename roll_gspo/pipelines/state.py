"""The progress of a run: everything besides its trained models that the next step depends on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from roll_gspo.checkpoint import Best
from roll_gspo.data.sampler import Sampler
from roll_gspo.errors import CheckpointError

FILE = "state.json"
ACTOR = "actor_train"
ItemT = TypeVar("ItemT")


@dataclass
class RunState(Generic[ItemT]):
    """Mutable state that a checkpoint holds. Pipelines with further state subclass it.

    Attributes:
        step: the last completed step.
        sampler: the order of the data and the position in it.
        best: the best checkpoint by `checkpoint_config.keep_best`, including one that is still being written.
    """

    step: int
    sampler: Sampler[ItemT]
    best: Best | None = field(default=None, kw_only=True)

    @property
    def first_logged_step(self) -> int:
        """First step that this process logs; 0, the validation before training, if no step is completed."""
        return self.step + 1 if self.step else 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        best = asdict(self.best) if self.best else None
        return {"step": self.step, "sampler": self.sampler.state_dict(), "best": best}

    def load_state_dict(self, document: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: the training data has changed.
        """
        self.step = document["step"]
        self.sampler.load_state_dict(document["sampler"])
        best = document.get("best")  # earlier versions had none
        self.best = Best(**best) if best else None

    def save(self, folder: Path) -> None:
        """Write the state into an existing folder."""
        (folder / FILE).write_text(json.dumps(self.state_dict(), indent=1), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Load what `save` wrote.

        Raises:
            CheckpointError: the file is not readable, or the training data has changed.
        """
        try:
            self.load_state_dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / FILE}: cannot be read ({error}); choose another checkpoint") from error

    def update_best(self, metric: str | None, mode: str, validation: Mapping[str, float]) -> bool:
        """Return whether this step's validation is the best up to now; if so, `best` becomes this step.

        A metric that is missing or NaN, because nothing could be scored, is no improvement.

        Args:
            metric, mode: `checkpoint_config.keep_best` (None: no best checkpoint is kept) and `keep_best_mode`.
            validation: metrics of the validation.
        """
        value = validation.get(metric, math.nan) if metric is not None else math.nan
        before = self.best.value if self.best is not None else math.inf if mode == "min" else -math.inf
        better = value < before if mode == "min" else value > before
        if better and metric is not None:
            self.best = Best(self.step, metric, mode, value)
        return better

    def metrics(self) -> dict[str, float]:
        """Return the passes over the data, `data/epoch`, or per domain if batches have shares of the domains."""
        passes = self.sampler.epochs()
        return {f"domain/{name}/epoch" if name else "data/epoch": value for name, value in passes.items()}
