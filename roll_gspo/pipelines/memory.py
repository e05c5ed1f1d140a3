"""Estimate of the memory of weights, gradients and optimizer states on every device, for the plan."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass

from roll_gspo.config.base import Problem
from roll_gspo.config.roles import CriticConfig, Role, TrainedRoleConfig
from roll_gspo.config.sft import AnyConfig
from roll_gspo.config.strategy import DeviceParameters
from roll_gspo.models.size import size_of
from roll_gspo.pipelines.devices import devices_of, devices_per_node, model_of, ranges

BYTES_PER_PARAMETER = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENT, MOMENTS, MAIN_COPY = 4, 8, 4  # bytes per parameter, all float32
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Estimated memory of a run in bytes.

    Attributes:
        of_roles: bytes on each device of a role, in the order of its `device_mapping`.
        of_devices: bytes of all roles by device.
    """

    of_roles: dict[str, tuple[float, ...]]
    of_devices: dict[int, float]

    def of_node(self, per_node: int) -> float:
        """Return the bytes on the fullest machine."""
        nodes: dict[int, float] = defaultdict(float)
        for device, amount in self.of_devices.items():
            nodes[device // per_node] += amount
        return max(nodes.values())


def memory_of(config: AnyConfig) -> Memory | None:
    """Estimate memory without activations, KV caches and the CUDA context; None if a size is not known yet."""
    of_roles, of_devices = {}, defaultdict[int, float](float)
    for name, role in config.roles().items():
        amounts = _of_role(config, role)
        if amounts is None:
            return None
        of_roles[name] = amounts
        # In one process without a mapping, all roles share the machine's one device.
        devices = devices_of(role) if config.execution == "ray" or role.device_mapping else (0,) * len(amounts)
        for device, amount in zip(devices, amounts, strict=True):
            of_devices[device] += amount
    return Memory(of_roles, dict(of_devices))


def memory_texts(config: AnyConfig) -> list[str]:
    """Return the memory rows of the plan."""
    memory = memory_of(config)
    if memory is None:
        return ["unknown until the model is downloaded"]
    fullest = max(memory.of_devices.values())
    texts = [
        f"about {fullest / GIB:.3g} GiB per device for weights, gradients and optimizer; activations and KV cache come "
        "on top"
    ]
    if len(memory.of_devices) > 1:
        texts.append(" · ".join(f"{name} {_span(amounts)} GiB" for name, amounts in memory.of_roles.items()))
    return texts


def memory_warnings(config: AnyConfig, on_cuda: bool | None) -> list[Problem]:
    """Warn if a run on worker slots of this machine needs more memory than the machine has."""
    memory = memory_of(config)
    if on_cuda is not False or memory is None:
        return []
    needed = memory.of_node(devices_per_node(config))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed < installed:
        return []
    largest = max(memory.of_roles, key=lambda name: sum(memory.of_roles[name]))
    message = (
        f"no GPU was found, so device(s) {ranges(tuple(sorted(memory.of_devices)))} are worker slots in main memory; "
        f"all roles need about {needed / GIB:.3g} GiB on one machine, and this one has {installed / GIB:.3g}; run on "
        "machines with GPUs"
    )
    return [Problem(f"{largest}.device_mapping", message)]


def _span(amounts: tuple[float, ...]) -> str:
    low, high = f"{min(amounts) / GIB:.3g}", f"{max(amounts) / GIB:.3g}"
    return low if low == high else f"{low} to {high}"


def _of_role(config: AnyConfig, role: Role) -> tuple[float, ...] | None:
    """Return the bytes on each device of a role."""
    args, num_devices, model = role.strategy_args, len(devices_of(role)), model_of(config, role)
    held = args.parameters_per_device(model, num_devices, value_head=isinstance(role, CriticConfig))
    if held is None:
        size = size_of(model)
        if size is None:
            return None
        share = size.num_parameters / args.model_parallel_size
        held = [DeviceParameters(share, share)] * num_devices
    itemsize = BYTES_PER_PARAMETER[role.model_args.dtype]
    is_trained = isinstance(role, TrainedRoleConfig)
    return tuple(_bytes(parameters, itemsize, is_trained) for parameters in held)


def _bytes(held: DeviceParameters, itemsize: int, is_trained: bool) -> float:
    """Return the bytes on one device; low-precision parameters have a float32 copy in the optimizer."""
    if not is_trained:
        return held.weights * itemsize
    state = MOMENTS + (MAIN_COPY if itemsize < 4 else 0)
    return held.weights * (itemsize + GRADIENT) + held.optimizer * state
