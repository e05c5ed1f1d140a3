"""The devices of every role in the plan: layouts, and reasons why they cannot run (no torch)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from roll_gspo.config.base import Problem
from roll_gspo.config.roles import ActorInferConfig, Role
from roll_gspo.config.sft import AnyConfig
from roll_gspo.config.suggestions import nearest_multiples
from roll_gspo.errors import ConfigError


def model_of(config: AnyConfig, role: Role) -> str:
    """Return name or folder of the model that a role holds; `actor_infer` uses the trainer's model."""
    block = config.actor_train if isinstance(role, ActorInferConfig) else role
    return block.model_args.model_name_or_path or config.pretrain


def devices_of(role: Role) -> tuple[int, ...]:
    """Return the devices of a role. Without a mapping, they are the devices of one worker, from 0."""
    return role.device_mapping or tuple(range(role.strategy_args.devices_per_worker))


def devices_per_node(config: AnyConfig) -> int:
    """Return the devices of one machine; a machine without devices counts as one."""
    return config.num_gpus_per_node or 1


def finds_cuda(config: AnyConfig) -> bool | None:
    """Return whether the roles will compute on GPUs according to this machine; None for a cluster elsewhere.

    A layout of several machines is for a cluster, of which a machine without GPUs may only plan the run.
    """
    if config.execution == "ray" and os.environ.get("RAY_ADDRESS", "local") != "local":
        return None
    return has_gpus() or (None if config.execution == "ray" and machines_of(config) > 1 else False)


def machines_of(config: AnyConfig) -> int:
    """Return the number of machines that the device mappings need."""
    return max(max(devices_of(role)) for role in config.roles().values()) // devices_per_node(config) + 1


def has_gpus() -> bool:
    """Return whether this machine has GPUs that CUDA_VISIBLE_DEVICES does not hide."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return Path("/dev/dxg").exists() or any(Path("/dev").glob("nvidia[0-9]*"))


def device_problems(config: AnyConfig, on_cuda: bool | None) -> list[Problem]:
    """Return every reason why the roles cannot run on the devices that they name.

    Args:
        config: the whole configuration.
        on_cuda: True if devices are GPUs; None if not known yet.
    """
    roles = config.roles()
    problems = _local_problems(roles) if config.execution == "local" else [*_node_problems(config, roles)]
    for name, role in roles.items():
        problems += _worker_problems(config, name, role)
        problems += _engine_problems(config, name, role, on_cuda)
    return problems


def _local_problems(roles: dict[str, Role]) -> list[Problem]:
    """Return settings that need more than the one process of `execution: local`."""
    problems = []
    for name, role in roles.items():
        shared = role.strategy_args.shared_process_problems()
        problems += (_of_engine(name, problem) for problem in shared)
        devices, key = role.device_mapping, f"{name}.device_mapping"
        if devices and len(devices) > 1:
            message = (
                f"{len(devices)} devices are for worker groups, but execution: local has one process; set execution: "
                "ray, or layout=single (device_mapping: null, parallel sizes 1)"
            )
            problems.append(Problem(key, message))
        elif devices and devices != (0,):
            message = (
                f"device {devices[0]} is a choice for worker groups, but execution: local has one process; set "
                "execution: ray, or device_mapping: null and choose with CUDA_VISIBLE_DEVICES"
            )
            problems.append(Problem(key, message))
        size = role.strategy_args.devices_per_worker
        if size > 1 and not (devices and len(devices) > 1):
            key = next(key for key, value in role.strategy_args.model_parallel_sizes.items() if value > 1)
            message = (
                f"{size} devices are for worker groups, but execution: local has one process; set execution: ray, or "
                "this size to 1"
            )
            problems.append(Problem(f"{name}.strategy_args.{key}", message))
    return problems


def _node_problems(config: AnyConfig, roles: dict[str, Role]) -> Iterator[Problem]:
    """Yield a number of devices or machines that is too small for the device mappings."""
    per_node, last = devices_per_node(config), max(max(devices_of(role)) for role in roles.values())
    needed = machines_of(config)
    if not config.num_gpus_per_node and last:
        yield Problem(
            "num_gpus_per_node",
            f"0 means one device per machine, but device_mapping reaches device {last}; set it to the devices of a "
            f"machine (GPUs, or worker slots if there are none), {last + 1} for one machine",
        )
    elif config.num_nodes is not None and config.num_nodes < needed:
        yield Problem(
            "num_nodes",
            f"device_mapping reaches device {last}, on machine {needed - 1} of {config.num_nodes} with "
            f"num_gpus_per_node {per_node} (counted from 0); set num_nodes: {needed}, or lower device_mapping",
        )


def _worker_problems(config: AnyConfig, name: str, role: Role) -> Iterator[Problem]:
    """Yield a problem if the number of devices does not fit the workers of the engine."""
    args, devices = role.strategy_args, devices_of(role)
    size, per_node, key = args.devices_per_worker, devices_per_node(config), f"{name}.device_mapping"
    if not (args.is_distributed or isinstance(role, ActorInferConfig)) and len(devices) > 1:
        message = f"{len(devices)} ranks, but {args.strategy_name} has one; set it to one device, or strategy=fsdp2"
        yield Problem(key, message)
        return
    if len(devices) % size:
        yield Problem(
            key,
            f"{len(devices)} device(s) are not a multiple of the {size} of one worker ({_sizes_text(role)}); name "
            f"{nearest_multiples(len(devices), size)}",
        )
        return
    for start in range(0, len(devices), size):
        worker = devices[start : start + size]
        if config.execution == "ray" and len({device // per_node for device in worker}) > 1:
            yield Problem(
                key,
                f"devices {ranges(worker)} are those of one worker ({_sizes_text(role)}), but lie on different "
                f"machines (num_gpus_per_node {per_node}); name devices of one machine",
            )


def _sizes_text(role: Role) -> str:
    sizes = role.strategy_args.model_parallel_sizes
    return " * ".join(f"{key.rpartition('.')[2]} {size}" for key, size in sizes.items())


def _engine_problems(config: AnyConfig, name: str, role: Role, on_cuda: bool | None) -> Iterator[Problem]:
    """Yield reasons why the engine cannot run the role's model in this layout."""
    model, num_devices = model_of(config, role), len(devices_of(role))
    if on_cuda:
        yield from (_of_engine(name, problem) for problem in role.strategy_args.missing_packages())
    try:
        for problem in role.strategy_args.layout_problems(model, num_devices, on_cuda):
            yield _of_engine(name, problem)
    except ConfigError as error:
        key = "pretrain" if model == config.pretrain else f"{name}.model_args.model_name_or_path"
        yield from (Problem(key, line) for line in str(error).splitlines())


def _of_engine(name: str, problem: Problem) -> Problem:
    """Return a problem of a role's `strategy_args` with the whole key."""
    return problem._replace(key=f"{name}.strategy_args.{problem.key}")


def layout_text(config: AnyConfig, role: Role) -> str:
    """Return devices, machines and parallel sizes of a role."""
    devices, args = devices_of(role), role.strategy_args
    where = "this machine" if role.device_mapping is None else f"devices {ranges(devices)}"
    nodes = tuple(sorted({device // devices_per_node(config) for device in devices}))
    last = max(max(devices_of(other)) for other in config.roles().values())
    if role.device_mapping is not None and last >= devices_per_node(config):
        where += f" on machine{'s' * (len(nodes) > 1)} {ranges(nodes)}"
    texts = [where]
    if sizes := args.layout_text(len(devices)):
        texts.append(sizes)
    if isinstance(role, ActorInferConfig):
        workers = f"{len(devices) // args.devices_per_worker or 1} engine(s)"
        texts[1:] = [" · ".join([*texts[1:], workers])]
    return ", ".join(texts)


def ranges(numbers: tuple[int, ...]) -> str:
    """Return `0-3` for consecutive numbers, else all of them."""
    if len(numbers) > 1 and numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))
