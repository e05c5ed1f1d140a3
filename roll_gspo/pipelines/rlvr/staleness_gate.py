"""The gate that acts if the samples of a step are too far from the policy that is trained on them."""

from __future__ import annotations

from collections.abc import Mapping

from roll_gspo.config.selection import StalenessGateConfig


class StalenessGate:
    """Compare the effective sample size of each rollout with a minimum.

    Args:
        config: the block `staleness_gate`.

    Attributes:
        action: `wait`, `skip` or `stop`.
        wants_fresh: the next batch is to be generated with the newest weights, because `action` is `wait` and the last
            rollout was below the minimum.
    """

    def __init__(self, config: StalenessGateConfig) -> None:
        self.action = config.action
        self.wants_fresh = False
        self._min_ess = config.min_ess

    def check(self, ess: float) -> str | None:
        """Return what is wrong with a rollout of this effective sample size, or None. Updates `wants_fresh`."""
        is_open = ess >= self._min_ess  # false if it is NaN
        self.wants_fresh = self.action == "wait" and not is_open
        return None if is_open else f"staleness/ess {ess:g} is below staleness_gate.min_ess {self._min_ess:g}"

    def state_dict(self) -> dict[str, bool]:
        """Return the state for a checkpoint."""
        return {"wants_fresh": self.wants_fresh}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        """Restore the state of `state_dict`; another `action` than `wait` never wants fresh samples."""
        self.wants_fresh = state["wants_fresh"] and self.action == "wait"
