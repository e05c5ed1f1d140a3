"""Everything of a run, beside its trained models, that its next step depends on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from roll_gspo.algorithms.kl import KLController
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.batch import Prompt
from roll_gspo.checkpoint import Best
from roll_gspo.data.sampler import Sampler
from roll_gspo.errors import CheckpointError

FILE = "state.json"
ACTOR = "actor_train"
CRITIC = "critic"
ItemT = TypeVar("ItemT")


@dataclass
class RunState(Generic[ItemT]):
    """Mutable, checkpointed.

    Attributes:
        step: steps that are done.
        sampler: the data order and the place in it.
        best: the best checkpoint so far by `checkpoint_config.keep_best`, the one that is being written included.
    """

    step: int
    sampler: Sampler[ItemT]
    best: Best | None = field(default=None, kw_only=True)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        best = asdict(self.best) if self.best else None
        return {"step": self.step, "sampler": self.sampler.state_dict(), "best": best}

    def load_state_dict(self, document: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the data is another.
        """
        self.step = document["step"]
        self.sampler.load_state_dict(document["sampler"])
        best = document.get("best")  # earlier versions had none
        self.best = Best(**best) if best else None

    def save(self, folder: Path) -> None:
        """Write into an existing folder."""
        (folder / FILE).write_text(json.dumps(self.state_dict(), indent=1), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote.

        Raises:
            CheckpointError: the file is not readable.
        """
        try:
            self.load_state_dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / FILE}: cannot be read ({error}); choose another checkpoint") from error

    def take_if_best(self, metric: str | None, mode: str, figures: Mapping[str, float]) -> bool:
        """Whether the figures of this step's validation are the best so far; then `best` is this step.

        A figure that is missing or NaN, for nothing could be scored, is no improvement.

        Args:
            metric, mode: `checkpoint_config.keep_best` (None: there is no best) and `keep_best_mode`.
            figures: of the validation.
        """
        value = figures.get(metric, math.nan) if metric is not None else math.nan
        before = self.best.value if self.best is not None else math.inf if mode == "min" else -math.inf
        better = value < before if mode == "min" else value > before
        if better and metric is not None:
            self.best = Best(self.step, metric, mode, value)
        return better

    def metrics(self) -> dict[str, float]:
        """The place in the data, and in that of each domain where the batches have shares of them."""
        passes = self.sampler.epochs()
        return {f"domain/{name}/epoch" if name else "data/epoch": figure for name, figure in passes.items()}


@dataclass
class TrainerState(RunState[Prompt]):
    """Of reinforcement learning.

    Attributes:
        step, sampler, best: see `RunState`.
        running_moments: of all scores.
        kl_controller: of the token-level KL, or None where it is off.
    """

    running_moments: RunningMoments
    kl_controller: KLController | None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return super().state_dict() | {
            "running_moments": self.running_moments.state_dict(),
            "kl_controller": self.kl_controller.state_dict() if self.kl_controller else None,
        }

    def load_state_dict(self, document: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: the data is another.
        """
        super().load_state_dict(document)
        self.running_moments.load_state_dict(document["running_moments"])
        if self.kl_controller is not None and document["kl_controller"] is not None:
            self.kl_controller.load_state_dict(document["kl_controller"])
