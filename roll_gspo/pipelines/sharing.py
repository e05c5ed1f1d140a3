"""Roles that share devices, and reasons why they cannot (no torch)."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.base import Problem
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.sft import AnyConfig
from roll_gspo.pipelines.devices import devices_of, ranges

_ENGINE = "actor_infer"


def sharing_roles(config: AnyConfig) -> dict[str, tuple[int, ...]]:
    """Return the devices of every role that shares one with another role.

    With `execution: local` all roles are on the one device of this process.
    """
    devices = {name: devices_of(role) for name, role in config.roles().items()}
    if config.execution == "local":
        devices = dict.fromkeys(devices, (0,))
    return {
        name: own
        for name, own in devices.items()
        if any(set(own) & set(others) for other, others in devices.items() if other != name)
    }


def offloaded_roles(config: AnyConfig, on_cuda: bool | None) -> dict[str, tuple[int, ...]]:
    """Return the devices of the roles that take turns on shared devices; empty if `offload_states` is off.

    Args:
        config: the whole configuration.
        on_cuda: True if devices are GPUs. If it is None, the roles take turns only if the key is true.
    """
    is_on = bool(on_cuda) if config.offload_states is None else config.offload_states
    return sharing_roles(config) if is_on else {}


def sharing_problems(config: AnyConfig, on_cuda: bool | None) -> Iterator[Problem]:
    """Yield reasons why roles cannot take turns on the devices that they share."""
    shared = offloaded_roles(config, on_cuda)
    for name in shared:
        args = config.roles()[name].strategy_args
        if (reason := args.offload_problem(on_cuda)) is not None:
            key = "offload_states" if config.offload_states else f"{name}.strategy_args.strategy_name"
            way_out = "set it to false or null" if config.offload_states else _apart(config, name)
            yield Problem(key, f"{name} shares device(s) {ranges(shared[name])}, but {reason}; {way_out}")
    if isinstance(config, ExperimentConfig) and config.async_generation_ratio and _ENGINE in shared:
        others = [name for name, own in shared.items() if name != _ENGINE and set(own) & set(shared[_ENGINE])]
        yield Problem(
            "async_generation_ratio",
            f"{config.async_generation_ratio} lets {_ENGINE} generate while {others[0]} works, but they share "
            f"device(s) {ranges(shared[_ENGINE])}, which {_ENGINE} leaves then; set 0, {_apart(config, _ENGINE)}",
        )


def sharing_warnings(config: AnyConfig, on_cuda: bool | None) -> Iterator[Problem]:
    """Yield a switch without an effect, and roles that stay in the memory of one device together."""
    shared = sharing_roles(config)
    if config.offload_states and not shared:
        yield Problem("offload_states", "true, but no role shares a device with another; set null")
    if config.offload_states is False and on_cuda and shared:
        together = ", ".join(shared)
        yield Problem(
            "offload_states", f"false keeps {together} in the memory of the same device(s) at the same time; set null"
        )


def sharing_texts(config: AnyConfig, on_cuda: bool | None) -> Iterator[str]:
    """Yield the row of the plan about shared devices, if there are any."""
    if shared := offloaded_roles(config, on_cuda):
        numbers = tuple(sorted({number for own in shared.values() for number in own}))
        yield f"{', '.join(shared)} take turns on device(s) {ranges(numbers)} (offload_states)"


def _apart(config: AnyConfig, name: str) -> str:
    """Return how a role gets other devices than the rest, as the end of a sentence."""
    keep_all = "or offload_states: false if everything fits at the same time"
    if config.execution == "local":
        return keep_all
    free = 1 + max(max(devices_of(role)) for role in config.roles().values())
    count = len(devices_of(config.roles()[name]))
    devices = ranges(tuple(range(free, free + count)))
    return f"give it other devices ({name}.device_mapping, e.g. {devices}), {keep_all}"
