"""Which device carries what of every role, and what of that cannot be: layouts in the plan (no torch)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from roll_gspo.config.roles import ActorInferConfig, CriticConfig, PolicyConfig, ReferenceConfig
from roll_gspo.config.sft import AnyConfig, SftConfig
from roll_gspo.config.strategy import MegatronInferArgs, MegatronTrainArgs, VllmArgs
from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.layout import engine_problems, layout_problems
from roll_gspo.models.size import architecture_of

Role = PolicyConfig | ActorInferConfig | ReferenceConfig | CriticConfig


def roles_of(config: AnyConfig) -> dict[str, Role]:
    """The roles that are built and hold a model."""
    if isinstance(config, SftConfig):
        return {"actor_train": config.actor_train}
    roles: dict[str, Role] = {"actor_train": config.actor_train, "actor_infer": config.actor_infer}
    if config.needs_reference and config.reference is not None:
        roles["reference"] = config.reference
    if config.needs_critic and config.critic is not None:
        roles["critic"] = config.critic
    return roles


def model_of(config: AnyConfig, role: Role) -> str:
    """Name or folder of the model that a role holds; the engine takes every weight from the trainer."""
    block = config.actor_train if isinstance(role, ActorInferConfig) else role
    return block.model_args.model_name_or_path or config.pretrain


def devices_of(role: Role) -> tuple[int, ...]:
    """The devices of a role; without a mapping one worker on the first."""
    return role.device_mapping or tuple(range(engine_size(role)))


def engine_size(role: Role) -> int:
    """Devices that one worker of a role takes: more than one for engines only."""
    args = role.strategy_args
    return args.strategy_config.tensor_parallel_size if isinstance(args, VllmArgs) else 1


def devices_per_node(config: AnyConfig) -> int:
    """Devices of one machine; a machine without any counts as one."""
    return config.num_gpus_per_node or 1


def finds_cuda(config: AnyConfig) -> bool | None:
    """Whether the roles will compute on GPUs, as far as this machine can tell; None on a cluster that is elsewhere."""
    if config.execution == "ray" and os.environ.get("RAY_ADDRESS", "local") != "local":
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return Path("/dev/dxg").exists() or any(Path("/dev").glob("nvidia[0-9]*"))


def device_problems(config: AnyConfig, on_cuda: bool | None) -> list[str]:
    """Every reason why the roles cannot run on the devices that they name.

    Args:
        config: the whole configuration.
        on_cuda: whether devices are GPUs; None where that is not known yet.

    Returns:
        One text a problem, which begins with the key to look at.
    """
    roles = roles_of(config)
    problems = _of_local(roles) if config.execution == "local" else [*_of_nodes(config, roles)]
    if config.execution == "ray" and on_cuda:
        problems += colocated(config)
    for name, role in roles.items():
        problems += _of_role(config, name, role, on_cuda)
    return problems


def _of_local(roles: dict[str, Role]) -> list[str]:
    """One process has one rank of each role."""
    problems = []
    for name, role in roles.items():
        devices = role.device_mapping
        if devices and len(devices) > 1:
            problems.append(
                f"{name}.device_mapping: {len(devices)} devices are for worker groups, but execution: local has one "
                "process; set execution: ray, or layout=single (device_mapping: null, parallel sizes 1)"
            )
        elif devices and devices != (0,):
            problems.append(
                f"{name}.device_mapping: device {devices[0]} is a choice for worker groups, but execution: local has "
                "one process; set execution: ray, or device_mapping: null and choose with CUDA_VISIBLE_DEVICES"
            )
        size = engine_size(role)
        if size > 1 and not (devices and len(devices) > 1):
            problems.append(
                f"{name}.strategy_args.strategy_config.tensor_parallel_size {size} is for worker groups, but "
                "execution: local has one process; set execution: ray, or tensor_parallel_size: 1"
            )
    return problems


def _of_nodes(config: AnyConfig, roles: dict[str, Role]) -> Iterator[str]:
    per_node, last = devices_per_node(config), max(max(devices_of(role)) for role in roles.values())
    needed = last // per_node + 1
    if not config.num_gpus_per_node and last:
        yield (
            f"num_gpus_per_node: 0 leaves one device a machine, but device_mapping reaches device {last}; set it to "
            f"the devices of a machine (GPUs, or worker slots where there are none), {last + 1} for one machine"
        )
    elif config.num_nodes is not None and config.num_nodes < needed:
        yield (
            f"num_nodes: device_mapping reaches device {last}, on machine {needed - 1} of {config.num_nodes} with "
            f"num_gpus_per_node {per_node} (counted from 0); set num_nodes: {needed}, or lower device_mapping"
        )


def colocated(config: AnyConfig) -> list[str]:
    """Roles that would share GPUs. On machines without GPUs they may: device numbers are worker slots there."""
    problems = []
    for (first, one), (second, other) in combinations(roles_of(config).items(), 2):
        if shared := sorted(set(devices_of(one)) & set(devices_of(other))):
            free = 1 + max(max(devices_of(role)) for role in roles_of(config).values())
            count = len(devices_of(other))
            problems.append(
                f"{second}.device_mapping: shares device(s) {ranges(tuple(shared))} with {first}; on GPUs each role "
                "needs devices of its own, for engines do not sleep and trainers are not offloaded; set it to e.g. "
                f"{ranges(tuple(range(free, free + count)))}"
            )
    return problems


def _of_role(config: AnyConfig, name: str, role: Role, on_cuda: bool | None) -> Iterator[str]:
    args, devices = role.strategy_args, devices_of(role)
    block = f"{name}.strategy_args.strategy_config"
    if isinstance(args, MegatronTrainArgs | MegatronInferArgs):
        try:
            model = architecture_of(model_of(config, role))
        except ConfigError as error:
            yield from str(error).splitlines()
            return
        yield from (f"{block}.{text}" for text in layout_problems(model, args.strategy_config, len(devices), on_cuda))
    elif isinstance(args, VllmArgs):
        yield from _of_engines(config, devices, args, name)
        if (model := _known(model_of(config, role))) is not None:
            yield from (f"{block}.{text}" for text in engine_problems(model, args.strategy_config))
    elif not isinstance(role, ActorInferConfig) and len(devices) > 1:
        yield (
            f"{name}.device_mapping: {len(devices)} ranks, but {args.strategy_name} has one; set it to one device, or "
            "strategy=megatron"
        )


def _of_engines(config: AnyConfig, devices: tuple[int, ...], args: Any, name: str) -> Iterator[str]:
    """Each engine takes as many devices as share it, of one machine."""
    size, per_node = args.strategy_config.tensor_parallel_size, devices_per_node(config)
    if len(devices) % size:
        below = len(devices) // size * size
        yield (
            f"{name}.device_mapping: {len(devices)} device(s) are not a multiple of tensor_parallel_size {size}; name "
            f"{f'{below} or {below + size}' if below else size}"
        )
        return
    for start in range(0, len(devices), size):
        engine = devices[start : start + size]
        if config.execution == "ray" and len({device // per_node for device in engine}) > 1:
            yield (
                f"{name}.device_mapping: devices {ranges(engine)} share an engine (tensor_parallel_size {size}), but "
                f"lie on different machines (num_gpus_per_node {per_node}); name devices of one machine"
            )


def _known(model: str) -> Architecture | None:
    """None also for a family that only other strategies know."""
    try:
        return architecture_of(model)
    except ConfigError:
        return None


def layout_text(config: AnyConfig, role: Role) -> str:
    """Devices, machines and parallel sizes of a role."""
    devices, args = devices_of(role), role.strategy_args
    where = "this machine" if role.device_mapping is None else f"devices {ranges(devices)}"
    nodes = tuple(sorted({device // devices_per_node(config) for device in devices}))
    last = max(max(devices_of(other)) for other in roles_of(config).values())
    if role.device_mapping is not None and last >= devices_per_node(config):
        where += f" on machine{'s' * (len(nodes) > 1)} {ranges(nodes)}"
    if isinstance(args, VllmArgs):
        size = args.strategy_config.tensor_parallel_size
        return f"{where}, TP {size} · {len(devices) // size or 1} engine(s)"
    if not isinstance(args, MegatronTrainArgs | MegatronInferArgs):
        return f"{where}, {len(devices)} engine(s)" if isinstance(role, ActorInferConfig) else where
    c = args.strategy_config
    virtual = c.virtual_pipeline_model_parallel_size
    sizes = [
        f"TP {c.tensor_model_parallel_size}{' + SP' if c.sequence_parallel else ''}",
        f"PP {c.pipeline_model_parallel_size}",
        *([f"VPP {virtual}"] if virtual else []),
        f"CP {c.context_parallel_size}",
        f"EP {c.expert_model_parallel_size}",
        *([f"ETP {c.expert_tensor_size}"] if c.expert_model_parallel_size > 1 else []),
        f"DP {len(devices) // c.model_parallel_size}",
    ]
    return f"{where}, {' · '.join(sizes)}"


def ranges(numbers: tuple[int, ...]) -> str:
    """`0-3` for numbers that follow one another, else all of them."""
    if len(numbers) > 1 and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))
