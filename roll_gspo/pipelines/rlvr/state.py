"""The progress of a run of reinforcement learning."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from roll_gspo.algorithms.kl import KLController
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.batch import Prompt
from roll_gspo.pipelines.rlvr.staleness_gate import StalenessGate
from roll_gspo.pipelines.state import RunState


class PendingGroups(Protocol):
    """Groups of samples that are not trained yet."""

    def frozen(self) -> AbstractContextManager[None]:
        """Let no group start or end in the block."""
        ...

    def sampler_state(self) -> dict[str, Any]:
        """Return the state of the sampler after the prompts of the groups that `save` writes."""
        ...

    def save(self, folder: Path) -> None:
        """Write the groups into a checkpoint."""
        ...

    def load(self, folder: Path, step: int) -> None:
        """Load what `save` wrote after `step`."""
        ...


@dataclass
class RlvrState(RunState[Prompt]):
    """`RunState` with the running statistics of rewards and KL.

    Attributes:
        step, sampler, best: attributes of `RunState`.
        running_moments: moments of all scores.
        kl_controller: controller of the token-level KL coefficient, None if that KL is off.
        staleness_gate: the gate of `staleness_gate`, None if it is off.
        pending: the groups in flight, if there can be any; set before `save` and `load`.
    """

    running_moments: RunningMoments
    kl_controller: KLController | None
    staleness_gate: StalenessGate | None = None
    pending: PendingGroups | None = field(default=None, kw_only=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return super().state_dict() | {
            **({"sampler": self.pending.sampler_state()} if self.pending is not None else {}),
            "running_moments": self.running_moments.state_dict(),
            "kl_controller": self.kl_controller.state_dict() if self.kl_controller else None,
            "staleness_gate": self.staleness_gate.state_dict() if self.staleness_gate else None,
        }

    def load_state_dict(self, document: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: the training data has changed.
        """
        super().load_state_dict(document)
        self.running_moments.load_state_dict(document["running_moments"])
        if self.kl_controller is not None and document["kl_controller"] is not None:
            self.kl_controller.load_state_dict(document["kl_controller"])
        gate = document.get("staleness_gate")  # absent in checkpoints of earlier versions
        if self.staleness_gate is not None and gate is not None:
            self.staleness_gate.load_state_dict(gate)

    def save(self, folder: Path) -> None:
        """Write the state and the groups in flight into an existing folder."""
        if self.pending is None:
            super().save(folder)
            return
        with self.pending.frozen():
            super().save(folder)
            self.pending.save(folder)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote.

        Raises:
            CheckpointError: a file is not readable, or the training data has changed.
        """
        super().load(folder)
        if self.pending is not None:
            self.pending.load(folder, self.step)
