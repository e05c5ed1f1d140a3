"""Placement of roles: in this process, or in groups of worker processes on the devices that the roles name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.roles import Role
from roll_gspo.config.sft import AnyConfig
from roll_gspo.errors import ConfigError
from roll_gspo.execution.base import (
    ClusterExecutor,
    Devices,
    ExecutionSettings,
    Executor,
    RemoteRole,
    RoleT,
    WorkerGroup,
)
from roll_gspo.pipelines.devices import devices_of, devices_per_node
from roll_gspo.pipelines.factories import (
    make_generator,
    make_replica,
)
from roll_gspo.pipelines.sharing import offloaded_roles, sharing_problems
from roll_gspo.pipelines.weight_transfer import transfer_choice, transfer_problems
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.profiled import Profilable
from roll_gspo.roles.replicas import Replicas
from roll_gspo.roles.shared_devices import Phase, Resident, SharedDevices
from roll_gspo.roles.weight_sync import BroadcastSync, InProcessSync, WeightSync
from roll_gspo.strategies.device import local_device


def execution_settings(config: AnyConfig) -> ExecutionSettings:
    """Return the executor's settings."""
    numbers = {number for role in config.roles().values() for number in devices_of(role)}
    return ExecutionSettings(
        devices=tuple(sorted(numbers)),
        devices_per_node=devices_per_node(config),
        call_timeout_s=config.worker_timeout_s,
        environment=config.system_envs,
    )


def worker_devices(config: AnyConfig, role: Role) -> Devices:
    """Return the devices of a role's workers."""
    return Devices(devices_of(role), role.strategy_args.devices_per_worker, devices_per_node(config))


class Engines(Profilable, Resident, Protocol):
    """The generation engines: a role of this process, or all replicas."""


class InProcessPlacement:
    """Place every model in this process.

    Attributes:
        shared: devices of the roles that take turns on them.
    """

    def __init__(self, config: AnyConfig, executor: Executor) -> None:
        self.shared = _shared(config, on_gpus=local_device().type == "cuda")
        self._executor = executor

    def start(self, name: str, block: Role, make: Callable[[], RoleT]) -> RoleT:
        """Build a role that trains or scores."""
        return self._executor.start(name, make)

    def start_generator(
        self, config: ExperimentConfig, checkpoint: Path, pad_token_id: int
    ) -> tuple[Generator, Engines]:
        """Build the generation engine, which is profiled as a whole."""
        make = partial(make_generator, config, checkpoint, pad_token_id, "actor_infer" in self.shared)
        generator = self._executor.start("actor_infer", make)
        return generator, generator

    def weight_sync(
        self, config: ExperimentConfig, actor: Actor, generator: Generator, engines: Engines, devices: SharedDevices
    ) -> WeightSync:
        """Return the transfer of new weights. The engine reads the trainer's tensors."""
        return InProcessSync(actor, generator)


class ClusterPlacement:
    """Place every model in worker processes. `actor_infer` is a role of this process that distributes prompts.

    Workers of several roles may be on one GPU, because each worker sees exactly the devices of its role.

    Attributes:
        shared: devices of the roles that take turns on them.
    """

    def __init__(self, config: AnyConfig, executor: ClusterExecutor) -> None:
        self.shared = _shared(config, executor.uses_gpus)
        self._config = config
        self._executor = executor
        self._groups: dict[str, WorkerGroup] = {}

    def start(self, name: str, block: Role, make: Callable[[], RoleT]) -> RoleT:
        """Build a role that trains or scores, one rank per device."""
        devices, environment = worker_devices(self._config, block), self._environment(block)
        group = self._executor.start_group(name, make, devices, one_world=True, environment=environment)
        self._groups[name] = group
        return cast(RoleT, RemoteRole(group))

    def start_generator(
        self, config: ExperimentConfig, checkpoint: Path, pad_token_id: int
    ) -> tuple[Generator, Engines]:
        """Build one generation engine per worker, each of which is profiled."""
        devices, is_shared = worker_devices(config, config.actor_infer), "actor_infer" in self.shared
        make = partial(make_replica, config, checkpoint, is_shared)
        environment = self._environment(config.actor_infer)
        group = self._executor.start_group("actor_infer", make, devices, one_world=False, environment=environment)
        continues = config.updates_in_flight and config.partial_rollouts == "continue"
        replicas = Replicas(group, None if is_shared else config.max_worker_restarts, continue_lost=continues)
        return Generator(replicas, pad_token_id, config.seed, replicas.stream), replicas

    def weight_sync(
        self, config: ExperimentConfig, actor: Actor, generator: Generator, engines: Engines, devices: SharedDevices
    ) -> WeightSync:
        """Return the transfer of new weights from the trainer to all engines."""
        replicas, transfer = cast(Replicas, engines), config.weight_transfer
        uses_gpus = self._executor.uses_gpus
        # The plan reports this too if the machine of the command has the devices of the cluster.
        if problems := [*transfer_problems(config, uses_gpus)]:
            raise ConfigError("\n".join(map(str, problems)))
        weights = BroadcastSync(
            self._groups["actor_train"],
            replicas,
            generator,
            workers_per_replica=worker_devices(config, config.actor_infer).per_worker,
            timeout_s=min(transfer.timeout_s, config.worker_timeout_s),
            bucket_bytes=None if transfer.bucket_mb is None else transfer.bucket_mb << 20,
            checksum=transfer.checksum,
            backend=transfer_choice(config, uses_gpus).backend,
            falls_back=transfer.backend == "auto",
        )
        restore = replicas.restore_weights

        def restore_weights() -> None:
            devices.enter(Phase.SYNCING)
            restore()

        replicas.restore_weights = restore_weights
        return weights

    def _environment(self, block: Role) -> Mapping[str, str]:
        return block.strategy_args.gpu_environment if self._executor.uses_gpus else {}


def placement_of(config: AnyConfig, executor: Executor) -> InProcessPlacement | ClusterPlacement:
    """Return where `execution` places the roles."""
    if config.execution == "local":
        return InProcessPlacement(config, executor)
    return ClusterPlacement(config, cast(ClusterExecutor, executor))


def _shared(config: AnyConfig, on_gpus: bool) -> dict[str, tuple[int, ...]]:
    """Return the devices of the roles that take turns on them.

    Raises:
        ConfigError: a role cannot; the plan reports it too if the machine of the command has the devices.
    """
    if problems := list(sharing_problems(config, on_gpus)):
        raise ConfigError("\n".join(map(str, problems)))
    return offloaded_roles(config, on_gpus)
