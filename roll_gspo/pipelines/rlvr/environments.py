"""The environments of a run, from its configuration."""

from __future__ import annotations

from roll_gspo.config.environments import EnvironmentConfig
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.roles.environment_manager import EnvironmentManager, EnvironmentSettings
from roll_gspo.roles.episodes import EpisodeLimits


def environment_manager(config: ExperimentConfig) -> EnvironmentManager:
    """Build the manager of the environments; no process starts before the first episode."""
    training = config.train_env_manager
    assert training is not None
    validation = config.val_env_manager or training
    prompt, response = config.validation_prompt_length, config.validation_response_length

    def limits(block: EnvironmentConfig, longest_prompt: int, longest: int) -> EpisodeLimits:
        per_turn = min(block.max_tokens_per_step or longest, longest)
        return EpisodeLimits(block.max_steps, longest_prompt, longest, per_turn, block.episode_timeout_s)

    return EnvironmentManager(
        {
            name: EnvironmentSettings(
                spec=EnvironmentSpec(block.env_type, block.env_config, block.python),
                tags=block.tag_included,
                limits=limits(block, config.prompt_length, config.max_response_length),
                validation_limits=limits(block, prompt, response),
                num_workers=training.num_workers,
                validation_workers=validation.num_workers,
                episodes_per_worker=training.episodes_per_worker,
                validation_episodes_per_worker=validation.episodes_per_worker,
                timeout_s=block.timeout_s,
                start_timeout_s=block.start_timeout_s,
                max_memory_mb=block.max_memory_mb,
            )
            for name, block in config.played_environments.items()
        },
        training.format_penalty,
        validation.format_penalty,
    )
