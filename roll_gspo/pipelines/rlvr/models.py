"""Start the roles that hold a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.roles import CriticConfig, ReferenceConfig
from roll_gspo.execution.base import Executor
from roll_gspo.pipelines.factories import make_actor, make_critic, make_reference
from roll_gspo.pipelines.placement import Engines, placement_of
from roll_gspo.pipelines.pretrain import prepare_checkpoint
from roll_gspo.pipelines.state import ACTOR
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.critic import Critic
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.profiled import Profilable
from roll_gspo.roles.reference import BaseReference, Reference
from roll_gspo.roles.shared_devices import Resident, SharedDevices
from roll_gspo.roles.trained import TrainedRole
from roll_gspo.roles.weight_sync import WeightSync
from roll_gspo.strategies.residency import Residency
from roll_gspo.tracking.console import Console

CRITIC, REFERENCE = "critic", "reference"


@dataclass(frozen=True)
class Models:
    """The roles that hold a model.

    Attributes:
        actor_train: the policy that is trained.
        reference, critic: None if no KL term or no estimator needs them. The reference may be `actor_train` itself.
        actor_infer: the policy that generates.
        weights: sends the weights of `actor_train` to `actor_infer`.
        devices: the devices that roles share. All of these roles are offloaded.
        profiled: what the profiler records, by the name of the role.
    """

    actor_train: Actor
    reference: Reference | BaseReference | None
    critic: Critic | None
    actor_infer: Generator
    weights: WeightSync
    devices: SharedDevices
    profiled: Mapping[str, Profilable]


def trained_roles_of(actor: Actor, critic: Critic | None) -> dict[str, TrainedRole[Any]]:
    """Return the roles whose state a checkpoint holds, by the name of their folder in it."""
    return {ACTOR: actor} if critic is None else {ACTOR: actor, CRITIC: critic}


def start_models(
    config: ExperimentConfig, checkpoint: Path, executor: Executor, console: Console, pad_token_id: int
) -> Models:
    """Start every role that holds a model.

    A generation engine that shares its devices starts first, because vLLM measures the free memory. Each role leaves
    shared devices before the next one starts.

    Raises:
        ConfigError: the model or the engine does not allow a setting.
        WorkerError: a worker process does not start.
    """
    placement = placement_of(config, executor)
    shared: dict[str, Resident] = {}

    def start_engines() -> tuple[Generator, Engines]:
        with console.stage("start actor_infer"):
            generator, engines = placement.start_generator(config, checkpoint, pad_token_id)
            leave("actor_infer", engines)
        return generator, engines

    def leave(name: str, role: Resident) -> None:
        if name in placement.shared:
            role.reside(Residency.OFFLOADED)
            shared[name] = role

    started = start_engines() if "actor_infer" in placement.shared else None
    reference = critic = None
    with console.stage("start actor_train"):
        actor = placement.start("actor_train", config.actor_train, partial(make_actor, config, checkpoint))
        leave("actor_train", actor)
    if REFERENCE in config.roles() and config.reference is not None:
        with console.stage("start reference"):
            own = _checkpoint_of(config, config.reference, checkpoint, console)
            reference = placement.start("reference", config.reference, partial(make_reference, config, own))
            leave("reference", reference)
    if config.needs_critic and config.critic is not None:
        with console.stage("start critic"):
            own = _checkpoint_of(config, config.critic, checkpoint, console)
            critic = placement.start("critic", config.critic, partial(make_critic, config, own))
            leave("critic", critic)
    generator, engines = started or start_engines()
    devices = SharedDevices(shared, placement.shared)
    weights = devices.weights = placement.weight_sync(config, actor, generator, engines, devices)
    if shared:
        weights = devices
    roles = {"actor_train": actor, "reference": reference, "critic": critic, "actor_infer": engines}
    profiled = {name: role for name, role in roles.items() if role is not None}
    scores = BaseReference(actor) if config.reference_is_base else reference
    return Models(actor, scores, critic, generator, weights, devices, profiled)


def _checkpoint_of(
    config: ExperimentConfig, block: ReferenceConfig | CriticConfig, checkpoint: Path, console: Console
) -> Path:
    name = block.model_args.model_name_or_path
    return checkpoint if name is None else prepare_checkpoint(config, name, console)
