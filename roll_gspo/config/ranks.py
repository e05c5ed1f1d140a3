"""How many ranks a role has, and how many of them hold one copy of its model."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.base import Problem
from roll_gspo.config.roles import CriticConfig, PolicyConfig, ReferenceConfig
from roll_gspo.config.strategy import MegatronTrainArgs


def broken_dtype_rules(role: str, block: PolicyConfig | CriticConfig | ReferenceConfig) -> Iterator[Problem]:
    """Yield a number format that no engine computes in."""
    if block.model_args.dtype == "fp16":
        yield Problem(f"{role}.model_args.dtype", "fp16 is not supported yet; set bf16 or fp32")


def broken_rank_rules(role: str, block: PolicyConfig | CriticConfig) -> Iterator[Problem]:
    """Yield a number of ranks that does not hold whole copies of the model."""
    ranks, copy = num_ranks(block), model_parallel_size(block)
    if ranks % copy:
        config = f"{role}.strategy_args.strategy_config"
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        yield Problem(
            f"{role}.device_mapping",
            f"{ranks} device(s) are not a multiple of the {copy} of one copy of the model (tensor * pipeline * context "
            f"parallel size in {config}); name {_nearest_multiples(ranks, copy)} devices, or change a size",
            tuple(f"{config}.{size}" for size in sizes),
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
