"""Memory in the plan: the table of phases, and what does not fit."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

from roll_gspo.config.base import Problem
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.roles import ActorInferConfig, ReferenceConfig, Role
from roll_gspo.config.sft import AnyConfig
from roll_gspo.models.tiny import BUILTIN
from roll_gspo.pipelines.devices import devices_per_node, ranges
from roll_gspo.pipelines.gpu_memory import GpuMemory
from roll_gspo.pipelines.memory import (
    GIB,
    Memory,
    Parts,
    estimate_memory,
    role_states,
    scoring_size,
    state_bytes,
    state_bytes_of_machine,
    training_size,
)
from roll_gspo.pipelines.memory_fit import Fit, excess_bytes, nearest_fit
from roll_gspo.pipelines.sharing import offloaded_roles
from roll_gspo.strategies.residency import Phase, Residency

_NAMES = {"kv_cache": "KV cache"}


def has_gpu_plan(config: AnyConfig, on_cuda: bool | None) -> bool:
    """Return whether memory is planned for GPUs: not for a small builtin model on a machine without any."""
    return on_cuda is not False or config.gpu_memory_gb is not None or not config.pretrain.startswith(BUILTIN)


def memory_texts(config: AnyConfig, gpu: GpuMemory, on_cuda: bool | None) -> list[str]:
    """Return the memory rows of the plan."""
    if not has_gpu_plan(config, on_cuda):
        states = state_bytes(config)
        if states is None:  # the name of a builtin model is wrong, which another check reports
            return ["unknown"]
        return [f"about {max(states.values()) / GIB:.3g} GiB for weights, gradients and optimizer"]
    memory = estimate_memory(config, gpu.gib * GIB)
    if memory is None:
        return ["unknown until the model is downloaded"]
    return [*_table(memory, gpu), *_role_texts(config, memory), *_host_texts(config, memory)]


def _table(memory: Memory, gpu: GpuMemory) -> Iterator[str]:
    """Yield the head of the table, and a row per group of devices with the same roles: its fullest device."""
    groups = _groups(memory)
    width = max(len("GiB per device"), *(len(label) for label in groups))
    yield f"{'GiB per device':<{width}}  {'  '.join(memory.phases)}  of {gpu.text}"
    for label, devices in groups.items():
        fullest = [max(memory.total(phase, device) for device in devices) for phase in memory.phases]
        cells = (f"{amount / GIB:>{len(phase)}.1f}" for phase, amount in zip(memory.phases, fullest, strict=True))
        yield f"{label:<{width}}  {'  '.join(cells)}"


def _groups(memory: Memory) -> dict[str, list[int]]:
    """Return the devices with the same roles, by their label."""
    of_roles: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for device, roles in sorted(next(iter(memory.phases.values())).items()):
        of_roles[tuple(sorted(roles))].append(device)
    return {f"device{'s' * (len(group) > 1)} {ranges(tuple(group))}": group for group in of_roles.values()}


def _role_texts(config: AnyConfig, memory: Memory) -> Iterator[str]:
    """Yield the parts of every role on its fullest device, in the phase in which it needs most."""
    for name, role in config.roles().items():
        phase, found = _busy_phase(role), memory.roles[name]
        at_work = (found.parts(index, phase, Residency.FULL, 0.0) for index in range(len(found.devices)))
        text = f"{name} {phase}: {parts_text(max(at_work, key=lambda parts: parts.total))}"
        if found.generation is not None and isinstance(config, ExperimentConfig):
            tokens, length = min(one.num_tokens for one in found.generation), config.engine_sequence_length
            text += f"; {tokens:,} tokens in the KV cache of an engine, {tokens // length:,} sequences of {length:,}"
        size = training_size(config, role) or scoring_size(config, role)
        if size is not None:
            text += f"; up to {size.positions:,} positions per micro-batch"
        if found.generation is None and found.scoring is None:
            text += "; activations and KV cache are not known for this model"
        yield text


def _host_texts(config: AnyConfig, memory: Memory) -> Iterator[str]:
    """Yield the main memory that holds the states of roles that are off their devices."""
    nodes: dict[int, float] = defaultdict(float)
    for name in offloaded_roles(config, on_cuda=True):
        if isinstance(config.roles()[name], ActorInferConfig):
            continue  # an engine drops its weights
        for device, parts in zip(memory.roles[name].devices, memory.roles[name].states, strict=True):
            nodes[device // devices_per_node(config)] += parts.weights + parts.optimizer
    if nodes:
        yield f"main memory of a machine: {max(nodes.values()) / GIB:.0f} GiB for states that are off its GPUs"


def _busy_phase(role: Role) -> Phase:
    """Return the phase in which a role needs most."""
    if isinstance(role, ActorInferConfig):
        return Phase.GENERATING
    return Phase.SCORING if isinstance(role, ReferenceConfig) else Phase.TRAINING


def parts_text(parts: Parts) -> str:
    """Return e.g. `weights 7.1 + gradients 14.2`, without parts that round to 0."""
    amounts = {**parts._asdict(), "reserve": parts.reserve}
    shown = [f"{_NAMES.get(key, key)} {value / GIB:.1f}" for key, value in amounts.items() if value >= 0.05 * GIB]
    return " + ".join(shown) or "under 0.1"


def memory_problems(config: AnyConfig, gpu: GpuMemory) -> list[Problem]:
    """Return what does not fit into the GPUs, with the nearest settings that do."""
    size = gpu.gib * GIB
    memory = estimate_memory(config, size)
    if memory is None or excess_bytes(config, memory, size) <= 0:
        return []
    fit = nearest_fit(config, size)
    assert fit is not None
    phase, device = memory.fullest()
    needed, roles = memory.total(phase, device), memory.phases[phase][device]
    largest = max(roles, key=lambda name: roles[name].total)
    if needed <= size:
        name = next(name for name, role in config.roles().items() if isinstance(role, ActorInferConfig))
        found = "the engine has no room for the KV cache of one sequence"
        return [Problem(_key(fit, name), f"{found} beside its weights, of {gpu.text}; {_advice(fit, gpu)}")]
    text = (
        f"{phase} needs about {needed / GIB:.1f} GiB on device {device} ({largest}: {parts_text(roles[largest])}), of "
        f"{gpu.text}; {_advice(fit, gpu)}"
    )
    return [Problem(_key(fit, largest), text)]


def _key(fit: Fit, name: str) -> str:
    return next(iter(fit.changes), f"{name}.device_mapping") if fit.fits else f"{name}.device_mapping"


def _advice(fit: Fit, gpu: GpuMemory) -> str:
    phase, device = fit.memory.fullest()
    needed = f"{fit.memory.total(phase, device) / GIB:.1f} GiB"
    if fit.fits:
        return f"set {overrides_text(fit)} (then about {needed})"
    return f"no smaller setting fits on these devices (the nearest needs {needed}); name more devices"


def overrides_text(fit: Fit) -> str:
    """Return the changes as arguments of the command line."""
    values = ((key, str(value).lower() if isinstance(value, bool) else value) for key, value in fit.changes.items())
    return " ".join(f"{key}={value}" for key, value in values)


def main_memory_warnings(config: AnyConfig, on_cuda: bool | None) -> list[Problem]:
    """Warn if a run on worker slots of this machine needs more memory than the machine has."""
    states, needed = state_bytes(config), state_bytes_of_machine(config)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if on_cuda is not False or states is None or needed is None or needed < installed:
        return []
    roles = config.roles()
    largest = max(roles, key=lambda name: sum(map(sum, role_states(config, roles[name]) or ())))
    message = (
        f"no GPU was found, so device(s) {ranges(tuple(sorted(states)))} are worker slots in main memory; all roles "
        f"need about {needed / GIB:.3g} GiB on one machine, and this one has {installed / GIB:.3g}; run on machines "
        "with GPUs"
    )
    return [Problem(f"{largest}.device_mapping", message)]
