"""The shipped environments. This module does not import pydantic, because worker processes import it."""

from __future__ import annotations

from roll_gspo.registry import Registry

ENVIRONMENTS = Registry(
    "env_type",
    {
        "adding_machine": "roll_gspo.environments.adding_machine:AddingMachine",
        "gymnasium": "roll_gspo.environments.gymnasium_games:GymnasiumEnvironment",
        "openenv": "roll_gspo.environments.openenv_server:OpenEnv",
        "frozen_lake": "roll_gspo.environments.frozen_lake:FrozenLake",
        "sokoban": "roll_gspo.environments.sokoban:Sokoban",
        "verifiers": "roll_gspo.environments.verifiers_tasks:Verifiers",
        "tool_use": "roll_gspo.environments.tool_use:ToolUse",
    },
)
SEEDS = "builtin:seeds"
"""`file_name` of rows that hold nothing but the seed of an environment."""
AGENT = "agent"
"""Domain of all rows that an agent plays."""
OTHERS = "*"
"""Tag of rows that match no other domain or tag."""
