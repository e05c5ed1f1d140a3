"""Which role lives where: everything in this process, or groups of processes on the devices that the roles name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.roles import CriticConfig, ReferenceConfig
from roll_gspo.config.sft import AnyConfig, SftConfig
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
from roll_gspo.pipelines.devices import Role, colocated, devices_of, devices_per_node, roles_of
from roll_gspo.pipelines.factories import (
    make_actor,
    make_critic,
    make_generator,
    make_reference,
    make_replica,
    make_sft_actor,
)
from roll_gspo.pipelines.pretrain import prepare_checkpoint
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.critic import Critic
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.reference import Reference
from roll_gspo.roles.replicas import Replicas
from roll_gspo.roles.sft_actor import SftActor
from roll_gspo.roles.weight_sync import BroadcastSync, InProcessSync, WeightSync
from roll_gspo.tracking.console import Console


@dataclass(frozen=True)
class Models:
    """The roles that hold a model, and the way of the weights between two of them."""

    actor_train: Actor
    reference: Reference | None
    critic: Critic | None
    actor_infer: Generator
    weights: WeightSync


def start_models(
    config: ExperimentConfig, checkpoint: Path, executor: Executor, console: Console, pad_token_id: int
) -> Models:
    """Start every role that holds a model.

    Raises:
        ConfigError: a setting turns out to be impossible for the model or the engine.
        WorkerError: a worker process does not start.
    """
    place = _place(config, executor)
    reference = critic = None
    with console.stage("start actor_train"):
        actor = place.start("actor_train", config.actor_train, partial(make_actor, config, checkpoint))
    if config.needs_reference and config.reference is not None:
        with console.stage("start reference"):
            own = _own_checkpoint(config, config.reference, checkpoint, console)
            reference = place.start("reference", config.reference, partial(make_reference, config, own))
    if config.needs_critic and config.critic is not None:
        with console.stage("start critic"):
            own = _own_checkpoint(config, config.critic, checkpoint, console)
            critic = place.start("critic", config.critic, partial(make_critic, config, own))
    with console.stage("start actor_infer"):
        generator, weights = place.start_generator(config, checkpoint, pad_token_id, actor)
    return Models(actor, reference, critic, generator, weights)


def start_sft_actor(
    config: SftConfig, checkpoint: Path, executor: Executor, console: Console, num_steps: int
) -> SftActor:
    """Start the one role of supervised fine-tuning.

    Raises:
        ConfigError: a setting turns out to be impossible for the model or the engine.
        WorkerError: a worker process does not start.
    """
    make = partial(make_sft_actor, config, checkpoint, num_steps)
    with console.stage("start actor_train"):
        return _place(config, executor).start("actor_train", config.actor_train, make)


def execution_settings(config: AnyConfig) -> ExecutionSettings:
    """What the executor has to know of a run."""
    numbers = {number for role in roles_of(config).values() for number in devices_of(role)}
    return ExecutionSettings(
        devices=tuple(sorted(numbers)),
        devices_per_node=devices_per_node(config),
        call_timeout_s=config.worker_timeout_s,
        environment=config.system_envs,
    )


def worker_devices(config: AnyConfig, role: Role) -> Devices:
    """Of a role's workers."""
    return Devices(devices_of(role), role.strategy_args.devices_per_worker, devices_per_node(config))


def _own_checkpoint(
    config: ExperimentConfig, block: ReferenceConfig | CriticConfig, checkpoint: Path, console: Console
) -> Path:
    name = block.model_args.model_name_or_path
    return checkpoint if name is None else prepare_checkpoint(config, name, console)


class _InProcess:
    """Every model in this process."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def start(self, name: str, block: Role, make: Callable[[], RoleT]) -> RoleT:
        """One object."""
        return self._executor.start(name, make)

    def start_generator(
        self, config: ExperimentConfig, checkpoint: Path, pad_token_id: int, actor: Actor
    ) -> tuple[Generator, WeightSync]:
        """One engine, which reads the trainer's tensors."""
        make = partial(make_generator, config, checkpoint, pad_token_id)
        generator = self._executor.start("actor_infer", make)
        return generator, InProcessSync(actor, generator)


class _Cluster:
    """Every model in processes of its own; what generates is a role of this process that deals out prompts."""

    def __init__(self, config: AnyConfig, executor: ClusterExecutor) -> None:
        # the plan says so too, where the command's machine shows what the cluster's are
        if executor.uses_gpus and (problems := colocated(config)):
            raise ConfigError("\n".join(problems))
        self._config = config
        self._executor = executor
        self._groups: dict[str, WorkerGroup] = {}

    def start(self, name: str, block: Role, make: Callable[[], RoleT]) -> RoleT:
        """One rank a device."""
        group = self._executor.start_group(name, make, worker_devices(self._config, block), one_world=True)
        self._groups[name] = group
        return cast(RoleT, RemoteRole(group))

    def start_generator(
        self, config: ExperimentConfig, checkpoint: Path, pad_token_id: int, actor: Actor
    ) -> tuple[Generator, WeightSync]:
        """One engine for each `tensor_parallel_size` devices."""
        devices = worker_devices(config, config.actor_infer)
        make = partial(make_replica, config, checkpoint)
        group = self._executor.start_group("actor_infer", make, devices, one_world=False)
        replicas = Replicas(group, config.max_worker_restarts)
        generator = Generator(replicas, pad_token_id, config.seed)
        transfer = config.weight_transfer
        weights = BroadcastSync(
            self._groups["actor_train"],
            replicas,
            generator,
            workers_per_replica=devices.per_worker,
            timeout_s=min(transfer.timeout_s, config.worker_timeout_s),
            bucket_bytes=transfer.bucket_mb << 20,
            checksum=transfer.checksum,
        )
        return generator, weights


def _place(config: AnyConfig, executor: Executor) -> _InProcess | _Cluster:
    if config.execution == "local":
        return _InProcess(executor)
    return _Cluster(config, cast(ClusterExecutor, executor))
