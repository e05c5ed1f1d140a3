"""Conversion of `rewards` blocks to `RewardSpec`.

This module is separate from `spec`, because worker processes need no schema.
"""

from __future__ import annotations

from roll_gspo.config.rewards import RewardConfig
from roll_gspo.rewards.spec import CompositionSpec, PartSpec, RewardSpec, reward_spec


def spec_from_config(block: RewardConfig, key: str) -> RewardSpec:
    """Return the spec of a `rewards` block: its worker, or the composition of its parts.

    Args:
        block: validated block.
        key: key path of the block, for error messages.

    Raises:
        ConfigError: see `reward_spec`.
    """
    if block.worker_cls is not None:
        return reward_spec(block.worker_cls, block.arguments, key)
    assert block.combine is not None, "the schema requires combine if there are parts"
    parts = {
        name: PartSpec(
            reward_spec(part.worker_cls, part.worker_args, f"{key}.parts.{name}"),
            1.0 if part.weight is None else part.weight,
            1.0 if part.threshold is None else part.threshold,
        )
        for name, part in block.parts.items()
    }
    return CompositionSpec(block.title, "", {}, block.combine, parts, block.else_score)
