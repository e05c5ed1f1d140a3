"""What the weights, gradients and optimizer states of every role take on every device: an estimate for the plan."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass

from roll_gspo.config.roles import CriticConfig, PolicyConfig
from roll_gspo.config.sft import AnyConfig
from roll_gspo.config.strategy import MegatronConfig, MegatronInferArgs, MegatronTrainArgs
from roll_gspo.errors import ConfigError
from roll_gspo.models.layout import RankParameters, optimizer_shares, parameters_of_rank
from roll_gspo.models.size import architecture_of, size_of
from roll_gspo.pipelines.devices import Role, devices_of, devices_per_node, engine_size, model_of, ranges, roles_of

BYTES_PER_PARAMETER = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENT, MOMENTS, MAIN_COPY = 4, 8, 4  # bytes a parameter, all float32
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of a run: {role: bytes of each of its devices, in the order of its mapping}, and {device: bytes}."""

    of_roles: dict[str, tuple[float, ...]]
    of_devices: dict[int, float]

    def of_node(self, per_node: int) -> float:
        """Bytes on the fullest machine."""
        nodes: dict[int, float] = defaultdict(float)
        for device, amount in self.of_devices.items():
            nodes[device // per_node] += amount
        return max(nodes.values())


def memory_of(config: AnyConfig) -> Memory | None:
    """Estimate the memory of a run; None where the size of a model is not known yet.

    Activations, KV caches and what CUDA itself takes come on top.
    """
    of_roles, of_devices = {}, defaultdict[int, float](float)
    for name, role in roles_of(config).items():
        amounts = _of_role(config, role)
        if amounts is None:
            return None
        of_roles[name] = amounts
        # without a mapping in one process, every role is on this machine's one device
        devices = devices_of(role) if config.execution == "ray" or role.device_mapping else (0,) * len(amounts)
        for device, amount in zip(devices, amounts, strict=True):
            of_devices[device] += amount
    return Memory(of_roles, dict(of_devices))


def memory_texts(config: AnyConfig) -> list[str]:
    """The rows of the plan."""
    memory = memory_of(config)
    if memory is None:
        return ["unknown: the model is not here yet"]
    fullest = max(memory.of_devices.values())
    texts = [
        f"about {fullest / GIB:.3g} GiB a device for weights, gradients and optimizer; activations and KV cache come "
        "on top"
    ]
    if len(memory.of_devices) > 1:
        texts.append(" · ".join(f"{name} {_span(amounts)} GiB" for name, amounts in memory.of_roles.items()))
    return texts


def memory_warnings(config: AnyConfig, on_cuda: bool | None) -> list[str]:
    """That a run on worker slots of this machine takes more than the machine has."""
    memory = memory_of(config)
    if on_cuda is not False or memory is None:
        return []
    needed, there = memory.of_node(devices_per_node(config)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed < there:
        return []
    devices = ranges(tuple(sorted(memory.of_devices)))
    return [
        f"device_mapping: there is no GPU here, so that device(s) {devices} are worker slots in main memory: about "
        f"{needed / GIB:.3g} GiB on one machine, this one has {there / GIB:.3g}; run it on machines with GPUs"
    ]


def _span(amounts: tuple[float, ...]) -> str:
    low, high = f"{min(amounts) / GIB:.3g}", f"{max(amounts) / GIB:.3g}"
    return low if low == high else f"{low} to {high}"


def _of_role(config: AnyConfig, role: Role) -> tuple[float, ...] | None:
    """Bytes on each device of a role."""
    args, world_size, name = role.strategy_args, len(devices_of(role)), model_of(config, role)
    itemsize = BYTES_PER_PARAMETER[role.model_args.dtype]
    is_trained = isinstance(role, PolicyConfig | CriticConfig)
    if not isinstance(args, MegatronTrainArgs | MegatronInferArgs):
        size = size_of(name)
        if size is None:
            return None
        whole = RankParameters(size.num_parameters, 0)
        return (_bytes(whole, itemsize, is_trained, (1, 1)) / engine_size(role),) * world_size
    layout = args.strategy_config
    shares = optimizer_shares(layout, world_size)
    stages = _of_stages(name, layout, isinstance(role, CriticConfig))
    if stages is None:
        return None
    # ranks of a stage follow one another
    per_stage = max(world_size // len(stages), 1)
    amounts = [_bytes(stage, itemsize, is_trained, shares) for stage in stages for _ in range(per_stage)]
    return tuple((amounts + [max(amounts)] * world_size)[:world_size])


def _bytes(held: RankParameters, itemsize: int, is_trained: bool, shares: tuple[int, int]) -> float:
    """Of one rank; low-precision parameters have a float32 copy in the optimizer."""
    if not is_trained:
        return held.total * itemsize
    state = MOMENTS + (MAIN_COPY if itemsize < 4 else 0)
    return held.total * (itemsize + GRADIENT) + (held.shared / shares[0] + held.experts / shares[1]) * state


def _of_stages(name: str, layout: MegatronConfig, is_critic: bool) -> list[RankParameters] | None:
    """Parameters of a rank of each pipeline stage: counted where the architecture is known, else from the name."""
    pipeline = layout.pipeline_model_parallel_size
    try:
        model = architecture_of(name)
    except ConfigError:
        model = None
    if model is not None:
        head = "value" if is_critic else "vocabulary"
        return [parameters_of_rank(model, layout, stage, head) for stage in range(pipeline)]
    size = size_of(name)
    if size is None:
        return None
    shared = (size.num_parameters - size.num_expert_parameters) // (layout.tensor_model_parallel_size * pipeline)
    return [RankParameters(shared, size.num_expert_parameters // layout.expert_copy_size)] * pipeline
