"""Number of ranks of a role, and rules for splitting them into copies of its model."""

from __future__ import annotations

from collections.abc import Iterator

from roll_gspo.config.base import Problem
from roll_gspo.config.roles import ReferenceConfig, TrainedRoleConfig
from roll_gspo.config.suggestions import nearest_multiples


def broken_dtype_rules(role: str, block: TrainedRoleConfig | ReferenceConfig) -> Iterator[Problem]:
    """Yield a number format that no engine supports."""
    if block.model_args.dtype == "fp16":
        yield Problem(f"{role}.model_args.dtype", "fp16 is not supported yet; set bf16 or fp32")


def broken_rank_rules(role: str, block: TrainedRoleConfig) -> Iterator[Problem]:
    """Yield a number of ranks that is not a multiple of the ranks per model copy."""
    ranks, copy = num_ranks(block), block.strategy_args.model_parallel_size
    if ranks % copy:
        sizes = block.strategy_args.model_parallel_sizes
        product = " * ".join(f"{key.rpartition('.')[2]} {size}" for key, size in sizes.items())
        yield Problem(
            f"{role}.device_mapping",
            f"{ranks} device(s) are not a multiple of the {copy} of one copy of the model ({product}); name "
            f"{nearest_multiples(ranks, copy)} devices, or change a size",
            tuple(f"{role}.strategy_args.{key}" for key in sizes),
        )


def num_ranks(block: TrainedRoleConfig) -> int:
    """Return the number of ranks of a trained role."""
    return len(block.device_mapping or (0,))


def data_parallel_size(block: TrainedRoleConfig) -> int:
    """Return the number of data-parallel copies of a trained model."""
    return num_ranks(block) // block.strategy_args.model_parallel_size
