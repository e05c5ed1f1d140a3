"""The phases of a step on GPUs, and what every role has in device memory in each (no torch)."""

from __future__ import annotations

from roll_gspo.config.roles import ActorInferConfig, CriticConfig, ReferenceConfig, Role
from roll_gspo.config.sft import AnyConfig, SftConfig
from roll_gspo.pipelines.devices import devices_of
from roll_gspo.strategies.residency import Phase, Residency


def phases_of(config: AnyConfig) -> tuple[Phase, ...]:
    """Return the phases of a step."""
    if isinstance(config, SftConfig):
        return (Phase.SCORING, Phase.TRAINING) if config.validation else (Phase.TRAINING,)
    return tuple(Phase)


def role_devices(config: AnyConfig, role: Role) -> tuple[int, ...]:
    """Return the devices of a role. In one process without a mapping, all roles share the machine's one device."""
    devices = devices_of(role)
    return devices if config.execution == "ray" or role.device_mapping else (0,) * len(devices)


def residency_at_work(role: Role, phase: Phase) -> Residency:
    """Return what a role has on shared devices while it works in a phase, OFFLOADED if it does not.

    `roll_gspo.roles.shared_devices` enters the phases of scoring and training once per role, so that one of them is on
    the device at a time.
    """
    generates, scores_only = isinstance(role, ActorInferConfig), isinstance(role, ReferenceConfig)
    if phase == Phase.GENERATING:
        return Residency.FULL if generates else Residency.OFFLOADED
    if phase == Phase.SCORING:
        return Residency.OFFLOADED if generates else Residency.WEIGHTS
    if phase == Phase.TRAINING:
        return Residency.OFFLOADED if generates or scores_only else Residency.FULL
    return Residency.OFFLOADED if scores_only or isinstance(role, CriticConfig) else Residency.WEIGHTS
