"""The environments or the agent of a run, from its configuration."""

from __future__ import annotations

from roll_gspo.config.agent import AgentConfig
from roll_gspo.config.environments import EnvironmentConfig
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.environments.spec import EnvironmentSpec
from roll_gspo.roles.agents.program import AgentCommand
from roll_gspo.roles.environment_manager import EnvironmentManager, EnvironmentSettings
from roll_gspo.roles.episode_manager import EpisodeManager
from roll_gspo.roles.episodes import EpisodeLimits
from roll_gspo.tools.calls import FORMATS


def episode_manager(config: ExperimentConfig) -> EpisodeManager:
    """Build what plays the episodes. No process starts before the first episode."""
    return _environment_manager(config) if config.agent is None else _agent_manager(config, config.agent)


def _agent_manager(config: ExperimentConfig, agent: AgentConfig) -> EpisodeManager:
    # The modules of the endpoint need packages that other runs do not.
    from roll_gspo.roles.agents.client import AgentLimits
    from roll_gspo.roles.agents.manager import AgentManager, AgentSettings

    training = config.train_env_manager
    assert training is not None
    validation = config.val_env_manager or training

    def limits(prompt: int, response: int) -> AgentLimits:
        per_turn = min(agent.max_tokens_per_request or response, response)
        return AgentLimits(
            *(agent.max_requests, per_turn, response, prompt + response), agent.timeout_s, agent.max_concurrent
        )

    settings = AgentSettings(
        AgentCommand.of(agent),
        limits(config.prompt_length, config.max_response_length),
        limits(config.validation_prompt_length, config.validation_response_length),
        None if agent.tool_call_parser is None else FORMATS[agent.tool_call_parser],
    )
    return AgentManager(settings, training.format_penalty, validation.format_penalty)


def _environment_manager(config: ExperimentConfig) -> EnvironmentManager:
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
