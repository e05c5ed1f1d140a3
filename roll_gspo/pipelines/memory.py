"""Estimate of device memory for the plan: every role on every device, in every phase of a step."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from roll_gspo.config.memory import GenerationBytes, PassBytes, PassSize
from roll_gspo.config.roles import ActorInferConfig, CriticConfig, ReferenceConfig, Role, TrainedRoleConfig
from roll_gspo.config.sft import AnyConfig, SftConfig
from roll_gspo.config.strategy import DeviceParameters
from roll_gspo.models.size import adapter_parameters, size_of, supported_architecture_of
from roll_gspo.pipelines.devices import devices_of, devices_per_node, model_of
from roll_gspo.pipelines.memory_phases import phases_of, residency_at_work, role_devices
from roll_gspo.pipelines.sharing import offloaded_roles
from roll_gspo.pipelines.weight_transfer import transfer_choice
from roll_gspo.strategies.residency import Phase, Residency

BYTES_PER_PARAMETER = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENT, MOMENTS, MAIN_COPY = 4, 8, 4  # bytes per parameter, all float32
GIB = 2**30
CONTEXT = 0.75 * GIB  # CUDA context of a process with its libraries and the buffers of NCCL
RESERVE = 0.06  # part of activations, logits and buffers that the caching allocator loses to fragmentation
# Buckets on a device and their default size in MiB, by backend of `weight_transfer`; gloo's are in host memory.
_BUCKETS = {"gloo": (0, 0), "nccl": (2, 512), "ipc": (1, 2048)}
_UNKNOWN_MATRIX = 2**30  # bytes of the largest matrix of a model whose shape is not known


class Parts(NamedTuple):
    """Bytes of a role on one device in one phase; `working` is that of a generation engine besides its KV cache."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    kv_cache: float = 0.0
    working: float = 0.0
    buffers: float = 0.0

    @property
    def reserve(self) -> float:
        """Bytes that the allocator loses beside these."""
        return RESERVE * (self.activations + self.logits + self.buffers)

    @property
    def total(self) -> float:
        """Sum of all parts and the reserve."""
        return sum(self) + self.reserve


@dataclass(frozen=True)
class RoleMemory:
    """Memory of a role on each of its devices; a pass is None if it is not run or not known.

    Attributes:
        devices: numbers of the devices.
        states: weights, gradients and optimizer state.
        scoring: passes without gradient.
        training: passes with gradient.
        generation: of a generation engine.
        matrix: bytes of the largest whole matrix, which a weight transfer gathers.
    """

    devices: tuple[int, ...]
    states: tuple[Parts, ...]
    scoring: tuple[PassBytes, ...] | None
    training: tuple[PassBytes, ...] | None
    generation: tuple[GenerationBytes, ...] | None
    matrix: float

    def parts(self, index: int, phase: Phase, residency: Residency, bucket: float) -> Parts:
        """Return what the role holds on its device number `index`.

        Args:
            index: position of the device in `devices`.
            phase: part of the step.
            residency: part of the state that is on the device.
            bucket: bytes of a bucket of a weight transfer.
        """
        state = self.states[index]
        if residency < Residency.FULL:
            state = Parts(weights=state.weights if residency == Residency.WEIGHTS else 0.0)
        if self.generation is not None:
            of = self.generation[index]
            if residency < Residency.FULL:
                state = state._replace(working=of.asleep)
            else:
                state = state._replace(working=of.working, kv_cache=of.kv_cache)
        passes = {Phase.SCORING: self.scoring, Phase.TRAINING: self.training}.get(phase)
        if passes is not None and residency > Residency.OFFLOADED:
            state = state._replace(activations=passes[index].activations, logits=passes[index].logits)
        is_synced = self.generation is not None or self.training is not None
        if phase == Phase.SYNCING and is_synced and residency >= Residency.WEIGHTS:
            state = state._replace(buffers=self.matrix + min(bucket, state.weights))
        return state


@dataclass(frozen=True)
class Memory:
    """Estimated memory of a run.

    Attributes:
        roles: memory of every role by name.
        phases: bytes by phase, device and role.
        contexts: bytes of CUDA contexts by device.
    """

    roles: dict[str, RoleMemory]
    phases: dict[Phase, dict[int, dict[str, Parts]]]
    contexts: dict[int, float]

    def total(self, phase: Phase, device: int) -> float:
        """Return the bytes of all roles on a device."""
        return self.contexts[device] + sum(parts.total for parts in self.phases[phase][device].values())

    def fullest(self) -> tuple[Phase, int]:
        """Return the phase and the device with the most bytes."""
        pairs = ((phase, device) for phase in self.phases for device in self.phases[phase])
        return max(pairs, key=lambda pair: self.total(*pair))


def estimate_memory(config: AnyConfig, device_bytes: float) -> Memory | None:
    """Estimate the memory of every phase; None if the size of a model is not known yet.

    Args:
        config: the whole configuration.
        device_bytes: memory of a device, of which a generation engine may take a share.
    """
    roles: dict[str, RoleMemory] = {}
    for name, role in config.roles().items():
        memory = _role_memory(config, role, device_bytes)
        if memory is None:
            return None
        roles[name] = memory
    phases = {phase: _in_phase(config, roles, phase) for phase in phases_of(config)}
    return Memory(roles, phases, _contexts(config, roles))


def _in_phase(config: AnyConfig, roles: dict[str, RoleMemory], phase: Phase) -> dict[int, dict[str, Parts]]:
    """Return the bytes of every role on every device, as on GPUs."""
    of_devices: dict[int, dict[str, Parts]] = defaultdict(dict)
    bucket, turns = _bucket_bytes(config), offloaded_roles(config, on_cuda=True)
    for name, memory in roles.items():
        residency = residency_at_work(config.roles()[name], phase) if name in turns else Residency.FULL
        for index, device in enumerate(memory.devices):
            of_devices[device][name] = memory.parts(index, phase, residency, bucket)
    if phase in (Phase.SCORING, Phase.TRAINING):  # one role after the other
        for device, of_roles in of_devices.items():
            by_size = sorted((name for name in of_roles if name in turns), key=lambda name: -of_roles[name].total)
            for name in by_size[1:]:
                index = roles[name].devices.index(device)
                of_roles[name] = roles[name].parts(index, phase, Residency.OFFLOADED, bucket)
    return dict(of_devices)


def _bucket_bytes(config: AnyConfig) -> float:
    """Return the device memory of the buckets of a weight transfer, on either side."""
    if isinstance(config, SftConfig) or config.execution == "local":
        return 0.0
    number, default_mb = _BUCKETS[transfer_choice(config, on_cuda=True).backend]
    return number * (config.weight_transfer.bucket_mb or default_mb) * 2.0**20


def _contexts(config: AnyConfig, roles: dict[str, RoleMemory]) -> dict[int, float]:
    contexts: dict[int, float] = defaultdict(float)
    for memory in roles.values():
        for device in memory.devices:
            contexts[device] = CONTEXT if config.execution == "local" else contexts[device] + CONTEXT
    return dict(contexts)


def _role_memory(config: AnyConfig, role: Role, device_bytes: float) -> RoleMemory | None:
    model = model_of(config, role)
    states, itemsize = role_states(config, role), BYTES_PER_PARAMETER[role.model_args.dtype]
    if states is None:
        return None

    def passes(size: PassSize | None, *, train: bool) -> tuple[PassBytes, ...] | None:
        if size is None:
            return None
        has_value_head = isinstance(role, CriticConfig)
        found = role.strategy_args.pass_memory(
            model, len(states), size, itemsize, train=train, value_head=has_value_head
        )
        return None if found is None else tuple(found)

    generation = None
    if isinstance(role, ActorInferConfig):
        generation = _generation(config, role, states, device_bytes)
    architecture = supported_architecture_of(model)
    matrix = architecture.vocab_size * architecture.hidden_size * itemsize if architecture else _UNKNOWN_MATRIX
    return RoleMemory(
        role_devices(config, role),
        states,
        passes(scoring_size(config, role), train=False),
        passes(training_size(config, role), train=True),
        generation,
        matrix,
    )


def _generation(
    config: AnyConfig, role: ActorInferConfig, states: tuple[Parts, ...], device_bytes: float
) -> tuple[GenerationBytes, ...] | None:
    model, itemsize = model_of(config, role), BYTES_PER_PARAMETER[role.model_args.dtype]
    assert not isinstance(config, SftConfig)
    args, length = role.strategy_args, config.engine_sequence_length
    found = [args.generation_memory(model, state.weights, device_bytes, itemsize, length) for state in states]
    known = [one for one in found if one is not None]
    return tuple(known) if len(known) == len(found) else None


def longest_sequence(config: AnyConfig) -> int:
    """Return the longest sequence that is trained, in tokens."""
    return config.sequence_length if isinstance(config, SftConfig) else config.max_sequence_length


def training_size(config: AnyConfig, role: Role) -> PassSize | None:
    """Return the largest micro-batch of a trained role on GPUs, if all samples have the longest length."""
    if not isinstance(role, TrainedRoleConfig):
        return None
    args, role = role.training_args, role.on_device(True, model_of(config, role))
    size = _pass_size(config, args.per_device_train_batch_size, role.max_tokens_per_microbatch_in_train)
    return size._replace(micro_batches=args.gradient_accumulation_steps)


def scoring_size(config: AnyConfig, role: Role) -> PassSize | None:
    """Return the largest micro-batch of a pass without gradient on GPUs."""
    if not isinstance(role, TrainedRoleConfig | ReferenceConfig):
        return None
    budget = role.on_device(True, model_of(config, role)).max_tokens_per_microbatch_in_infer
    return _pass_size(config, role.infer_batch_size, budget)


def _pass_size(config: AnyConfig, samples: int, budget: int | None) -> PassSize:
    longest = longest_sequence(config)
    if budget is not None:
        positions = max(budget, longest)
        return PassSize(positions, positions)  # a short prompt leaves all of it to the response
    response = longest if isinstance(config, SftConfig) else config.max_response_length
    return PassSize(samples * longest, samples * response)


def role_states(config: AnyConfig, role: Role) -> tuple[Parts, ...] | None:
    """Return weights, gradients and optimizer state on each device of a role, or None if its size is not known yet."""
    args, num_devices, model = role.strategy_args, len(devices_of(role)), model_of(config, role)
    held = args.parameters_per_device(model, num_devices, value_head=isinstance(role, CriticConfig))
    size = size_of(model)
    if held is None:
        if size is None:
            return None
        share = size.num_parameters / args.model_parallel_size
        held = [DeviceParameters(share, share)] * num_devices
    itemsize = BYTES_PER_PARAMETER[role.model_args.dtype]
    if not isinstance(role, TrainedRoleConfig):
        adapters = _adapters(config, role, itemsize)
        return tuple(Parts(parameters.weights * itemsize + adapters) for parameters in held)
    if role.model_args.lora is not None and size is not None:
        lora = role.model_args.lora
        adapter = adapter_parameters(model, lora.rank, lora.target_modules) or 0
        return tuple(_with_adapter(p.weights * itemsize, adapter * p.weights / size.num_parameters) for p in held)
    itemsize = 4 if role.strategy_args.has_float32_weights else itemsize
    # low-precision parameters have a float32 copy in the optimizer
    state = MOMENTS + (MAIN_COPY if itemsize < 4 else 0)
    gradient = GRADIENT if role.strategy_args.has_float32_gradients else itemsize
    return tuple(
        Parts(parameters.weights * itemsize, parameters.weights * gradient, parameters.optimizer * state)
        for parameters in held
    )


def _with_adapter(frozen: float, adapter: float) -> Parts:
    """Return the states of a frozen model of `frozen` bytes and of a float32 adapter of `adapter` parameters."""
    return Parts(frozen + MAIN_COPY * adapter, GRADIENT * adapter, MOMENTS * adapter)


def _adapters(config: AnyConfig, role: Role, itemsize: int) -> float:
    """Return the bytes of the adapters that a generation engine holds on each device."""
    if not isinstance(role, ActorInferConfig) or isinstance(config, SftConfig) or not config.sends_adapters:
        return 0.0
    lora, args = config.actor_train.model_args.lora, role.strategy_args
    return args.adapter_memory(model_of(config, role), lora, config.versions_in_flight, itemsize)


def state_bytes(config: AnyConfig) -> dict[int, float] | None:
    """Return weights, gradients and optimizer states of all roles by device; None if a size is not known yet."""
    totals: dict[int, float] = defaultdict(float)
    for role in config.roles().values():
        states = role_states(config, role)
        if states is None:
            return None
        for device, parts in zip(role_devices(config, role), states, strict=True):
            totals[device] += sum(parts)
    return dict(totals)


def state_bytes_of_machine(config: AnyConfig) -> float | None:
    """Return the states of all roles on the fullest machine; None if a size is not known yet."""
    states = state_bytes(config)
    if states is None:
        return None
    machines: dict[int, float] = defaultdict(float)
    for device, amount in states.items():
        machines[device // devices_per_node(config)] += amount
    return max(machines.values())
