"""The progress of a run of reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from roll_gspo.algorithms.kl import KLController
from roll_gspo.algorithms.reward_norm import RunningMoments
from roll_gspo.batch import Prompt
from roll_gspo.pipelines.rlvr.staleness_gate import StalenessGate
from roll_gspo.pipelines.state import RunState


@dataclass
class RlvrState(RunState[Prompt]):
    """`RunState` with the running statistics of rewards and KL.

    Attributes:
        step, sampler, best: attributes of `RunState`.
        running_moments: moments of all scores.
        kl_controller: controller of the token-level KL coefficient, None if that KL is off.
        staleness_gate: the gate of `staleness_gate`, None if it is off.
    """

    running_moments: RunningMoments
    kl_controller: KLController | None
    staleness_gate: StalenessGate | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return super().state_dict() | {
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
