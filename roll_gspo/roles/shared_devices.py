"""Roles that share devices: which of them is in device memory in which phase of a step.

In a phase some roles work. Every role that shares a device with one of them is offloaded first. Then the working roles
get what they need. Roles whose devices are all their own stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Protocol

from roll_gspo.errors import ResidencyError, WeightTransferError
from roll_gspo.strategies.device import used_device_bytes
from roll_gspo.strategies.residency import OffloadableEngine, Phase, Residency

logger = logging.getLogger(__name__)
_GIB = 2**30
TRAINER, ENGINE = "actor_train", "actor_infer"


_NAMED = "the role that `enter` names"
RESIDENCIES: dict[Phase, dict[str, Residency]] = {
    Phase.GENERATING: {ENGINE: Residency.FULL},
    Phase.SCORING: {_NAMED: Residency.WEIGHTS},
    Phase.TRAINING: {_NAMED: Residency.FULL},
    Phase.SYNCING: {TRAINER: Residency.WEIGHTS, ENGINE: Residency.WEIGHTS},
}
"""Residency of the roles that work in each phase. `SYNCING` is entered from any phase and followed by `GENERATING`."""


class WeightSync(Protocol):
    """The methods of `roles.weight_sync.WeightSync`."""

    def push(self, version: int) -> None: ...

    def restore(self, version: int) -> None: ...


class Resident(Protocol):
    """A role, in this process or in others, whose engines can leave their devices."""

    def reside(self, residency: Residency) -> None:
        """Move the state of every engine; see `OffloadableEngine.reside`."""
        ...

    def device_memory(self) -> int | None:
        """Return the bytes in use on the first device of the role, by all processes; None without a GPU."""
        ...


class ResidentRole(Resident):
    """A role in the process of its engine."""

    _strategy: object

    def reside(self, residency: Residency) -> None:
        if not isinstance(self._strategy, OffloadableEngine):
            raise ResidencyError(
                f"{type(self._strategy).__name__}: is no OffloadableEngine, so it cannot share devices; set "
                "offload_states: false, or implement `residency` and `reside`"
            )
        self._strategy.reside(residency)

    def device_memory(self) -> int | None:
        return used_device_bytes()


class SharedDevices:
    """The phase of the shared devices, and what each role has on them.

    A step enters a phase before it calls a role. Memory that the devices use is measured at the borders.

    It is also the `WeightSync` of the roles that share devices. An engine that leaves its devices loses its weights, so
    `push` only notes the version. `send_weights` sends it when the engine is about to generate.

    Args:
        roles: roles that share a device with another one, by name. All of them are offloaded.
        devices: device numbers of each of these roles.

    Attributes:
        weights: transfers the weights; set before the first one.
        phase: the phase and the role that it was entered for; None before the first one and after a failed transition.
            Another `enter` then repeats what is left.
        needs_weights: the generation engine has other weights than the last `push` was for, or lost them.
    """

    def __init__(self, roles: Mapping[str, Resident], devices: Mapping[str, Collection[int]]) -> None:
        self._roles = roles
        self._devices = {name: frozenset(devices[name]) for name in roles}
        self._at: dict[str, Residency | None] = dict.fromkeys(roles, Residency.OFFLOADED)  # None: not known
        self._metrics: dict[str, float] = {}
        self._version: int | None = None
        self._measured = ""
        self.needs_weights = ENGINE in roles
        self.weights: WeightSync | None = None
        self.phase: tuple[Phase, str] | None = None

    def enter(self, phase: Phase, role: str = TRAINER) -> None:
        """Make the devices ready for a phase. No-op if it is the current one, or if its roles share no device.

        Args:
            phase: the phase. Before `GENERATING`, weights are sent if the engine needs them.
            role: the role that scores or trains.

        Raises:
            ResidencyError: an engine could not be moved.
        """
        working = {role if name == _NAMED else name: least for name, least in RESIDENCIES[phase].items()}
        working = {name: least for name, least in working.items() if name in self._roles}
        if not working:
            return
        if phase == Phase.GENERATING and self.needs_weights:
            self.send_weights()
        if self.phase == (phase, role):
            return
        self._measure("end")
        self.phase = None
        used = frozenset[int]().union(*(self._devices[name] for name in working))
        targets = {name: Residency.OFFLOADED for name, own in self._devices.items() if own & used} | working
        # Memory is freed before it is needed. An engine in an unknown state starts from nothing.
        for name, target in sorted(targets.items(), key=lambda item: item[1]):
            now = self._at[name]
            if now is None or now > target:
                self._move(name, Residency.OFFLOADED if now is None else target, phase)
        for name, target in targets.items():
            if self._at[name] != target:
                self._move(name, target, phase)
        self.phase, self._measured = (phase, role), next(iter(working))
        self._measure("start")

    def push(self, version: int) -> None:
        """Send the trainer's current weights as `version`, at the latest before the next `GENERATING`."""
        self._version, self.needs_weights = version, True
        if ENGINE not in self._roles:
            self.send_weights()

    def send_weights(self) -> None:
        """Send the weights of the last `push`.

        Raises:
            WeightTransferError: the engine did not receive the weights, or there was no `push`.
        """
        if self.weights is None or self._version is None:
            raise WeightTransferError("actor_infer: there are no weights to generate with; call push first")
        self.enter(Phase.SYNCING)
        self.weights.push(self._version)
        self.needs_weights = False

    def restore(self, version: int) -> None:
        """Restart lost engines, which need the trainer's weights; see `WeightSync.restore`."""
        self.enter(Phase.SYNCING)
        if self.weights is not None:
            self.weights.restore(version)

    def take_metrics(self) -> dict[str, float]:
        """Return the largest `memory/<phase>_start_gib` and `memory/<phase>_end_gib` since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _move(self, name: str, residency: Residency, phase: Phase) -> None:
        before, self._at[name] = self._at[name], None
        if name == ENGINE and (before is None or residency < before):
            self.needs_weights = True
        try:
            self._roles[name].reside(residency)
        except ResidencyError as error:
            raise ResidencyError(f"{name}, before {phase.value}: {error}") from error
        self._at[name] = residency
        logger.debug("%s: %s at %s", phase.value, name, residency.name)

    def _measure(self, border: str) -> None:
        """Record the memory in use on the devices of the role that works."""
        if self.phase is None:
            return
        phase, _ = self.phase
        used = self._roles[self._measured].device_memory()
        if used is None:
            logger.debug("%s: %s, no GPU to measure", phase.value, border)
            return
        name = f"memory/{phase.value}_{border}_gib"
        self._metrics[name] = max(used / _GIB, self._metrics.get(name, 0.0))
