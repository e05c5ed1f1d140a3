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
from roll_gspo.pipelines.placement import placement_of
from roll_gspo.pipelines.pretrain import prepare_checkpoint
from roll_gspo.pipelines.state import ACTOR
from roll_gspo.roles.actor import Actor
from roll_gspo.roles.critic import Critic
from roll_gspo.roles.generator import Generator
from roll_gspo.roles.profiled import Profilable
from roll_gspo.roles.reference import Reference
from roll_gspo.roles.trained import TrainedRole
from roll_gspo.roles.weight_sync import WeightSync
from roll_gspo.tracking.console import Console

CRITIC = "critic"


@dataclass(frozen=True)
class Models:
    """The roles that hold a model.

    Attributes:
        actor_train: the policy that is trained.
        reference, critic: None if no KL term or no estimator needs them.
        actor_infer: the policy that generates.
        weights: sends the weights of `actor_train` to `actor_infer`.
        profiled: what the profiler records, by the name of the role.
    """

    actor_train: Actor
    reference: Reference | None
    critic: Critic | None
    actor_infer: Generator
    weights: WeightSync
    profiled: Mapping[str, Profilable]


def trained_roles_of(actor: Actor, critic: Critic | None) -> dict[str, TrainedRole[Any]]:
    """Return the roles whose state a checkpoint holds, by the name of their folder in it."""
    return {ACTOR: actor} if critic is None else {ACTOR: actor, CRITIC: critic}


def start_models(
    config: ExperimentConfig, checkpoint: Path, executor: Executor, console: Console, pad_token_id: int
) -> Models:
    """Start every role that holds a model.

    Raises:
        ConfigError: the model or the engine does not allow a setting.
        WorkerError: a worker process does not start.
    """
    placement = placement_of(config, executor)
    reference = critic = None
    with console.stage("start actor_train"):
        actor = placement.start("actor_train", config.actor_train, partial(make_actor, config, checkpoint))
    if config.needs_reference and config.reference is not None:
        with console.stage("start reference"):
            own = _checkpoint_of(config, config.reference, checkpoint, console)
            reference = placement.start("reference", config.reference, partial(make_reference, config, own))
    if config.needs_critic and config.critic is not None:
        with console.stage("start critic"):
            own = _checkpoint_of(config, config.critic, checkpoint, console)
            critic = placement.start("critic", config.critic, partial(make_critic, config, own))
    with console.stage("start actor_infer"):
        generator, engines, weights = placement.start_generator(config, checkpoint, pad_token_id, actor)
    roles = {"actor_train": actor, "reference": reference, "critic": critic, "actor_infer": engines}
    profiled = {name: role for name, role in roles.items() if role is not None}
    return Models(actor, reference, critic, generator, weights, profiled)


def _checkpoint_of(
    config: ExperimentConfig, block: ReferenceConfig | CriticConfig, checkpoint: Path, console: Console
) -> Path:
    name = block.model_args.model_name_or_path
    return checkpoint if name is None else prepare_checkpoint(config, name, console)
