"""The frozen policy of the KL terms."""

from __future__ import annotations

from torch import Tensor

from roll_gspo.batch import Sequences
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.profiled import ProfiledRole, profiled
from roll_gspo.roles.shared_devices import ResidentRole
from roll_gspo.strategies.base import ScoringStrategy


class Reference(ProfiledRole, ResidentRole):
    """The role `reference`: scores tokens with the frozen initial policy."""

    def __init__(self, strategy: ScoringStrategy) -> None:
        self._strategy: ScoringStrategy = strategy

    @profiled
    def log_probs(self, sequences: Sequences) -> Tensor:
        """Return [B, T] log-probs of the response tokens."""
        return self._strategy.score(sequences).log_probs

    def close(self) -> None:
        """Do nothing: the engine lives as long as the process."""


class BaseReference:
    """The reference of a policy with an adapter: the policy's own model without the adapter.

    Args:
        actor: the policy.
    """

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def log_probs(self, sequences: Sequences) -> Tensor:
        """Return [B, T] log-probs of the response tokens."""
        return self._actor.base_log_probs(sequences)
