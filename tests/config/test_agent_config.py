"""Rules of the block `agent`."""

from __future__ import annotations

import pytest
from composed import load_config

from roll_gspo.config.environment_table import AGENT
from roll_gspo.errors import ConfigError

AGENT_ARGS = ("example_gspo", "agent.command=\"python my_agent.py --level '2 3'\"")


def test_agent_plays_the_episodes_of_all_rows():
    config = load_config(*AGENT_ARGS, "rewards=null", "train_env_manager.num_env_groups=32").config
    assert config.agent is not None
    assert config.agent.arguments == ("python", "my_agent.py", "--level", "2 3")
    assert config.plays_episodes
    assert list(config.domain_tags) == [AGENT]
    assert config.rollout_batch_size == 32


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((), "rewards"),
        (("rewards=null", "custom_envs.x.env_type=adding_machine"), "agent"),
        (("rewards=null", "actor_train.data_args.system_prompt=Hi"), "actor_train.data_args.system_prompt"),
        (("rewards=null", "agent.env.OPENAI_API_KEY=x"), "agent.env.OPENAI_API_KEY"),
        (("rewards=null", "agent.forward_env=[TMPDIR]"), "agent.forward_env"),
        (("rewards=null", "agent.command=''"), "agent.command"),
        (("rewards=null", 'agent.command="python \'x"'), "agent.command"),
        (("rewards=null", "agent.tool_call_parser=qwen"), "agent.tool_call_parser"),
    ],
)
def test_rules(arguments: tuple[str, ...], key: str):
    with pytest.raises(ConfigError, match=rf"(^|\W){key}: "):
        load_config(*AGENT_ARGS, *arguments)
