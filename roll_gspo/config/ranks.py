"""How many ranks a role has, and how many of them hold one copy of its model."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.roles import CriticConfig, PolicyConfig, ReferenceConfig
from roll_gspo.config.strategy import MegatronTrainArgs


def broken_dtype_rules(role: str, block: PolicyConfig | CriticConfig | ReferenceConfig) -> Iterator[str]:
    """What no engine computes in."""
    if block.model_args.dtype == "fp16":
        yield f"{role}.model_args.dtype: fp16 is not supported yet; set bf16 or fp32"


def broken_rank_rules(role: str, block: PolicyConfig | CriticConfig) -> Iterator[str]:
    """The ranks of a trained role hold whole copies of the model."""
    ranks, copy = num_ranks(block), model_parallel_size(block)
    if ranks % copy:
        yield (
            f"{role}.device_mapping names {ranks} device(s), not a multiple of the "
            f"{copy} that one copy of the model takes (tensor * pipeline * context parallel "
            f"size in {role}.strategy_args.strategy_config); name {_nearest_multiples(ranks, copy)} devices, or "
            "change a size"
        )


def _nearest_multiples(number: int, factor: int) -> str:
    below = number // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def num_ranks(block: PolicyConfig | CriticConfig) -> int:
    """Of a trained role."""
    return len(block.device_mapping or (0,))


def model_parallel_size(block: PolicyConfig | CriticConfig) -> int:
    """Ranks that hold one copy of a trained model together."""
    args = block.strategy_args
    return args.strategy_config.model_parallel_size if isinstance(args, MegatronTrainArgs) else 1
