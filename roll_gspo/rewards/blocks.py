"""From a block of the configuration to the reward it describes; apart, since worker processes need no schema."""

from __future__ import annotations

from roll_gspo.config.rewards import RewardConfig
from roll_gspo.rewards.catalog import CompositionSpec, PartSpec, RewardSpec, reward_spec


def block_spec(block: RewardConfig, where: str) -> RewardSpec:
    """The reward of a block of `rewards`: its worker, or the composition of its parts.

    Args:
        block: valid.
        where: its key path, for errors.

    Raises:
        ConfigError: as of `reward_spec`.
    """
    if block.worker_cls is not None:
        return reward_spec(block.worker_cls, block.arguments, where)
    assert block.combine is not None, "the schema asks for it beside parts"
    parts = {
        name: PartSpec(
            reward_spec(part.worker_cls, part.worker_args, f"{where}.parts.{name}"),
            1.0 if part.weight is None else part.weight,
            1.0 if part.threshold is None else part.threshold,
        )
        for name, part in block.parts.items()
    }
    return CompositionSpec(block.title, "", {}, block.combine, parts, block.else_score)
