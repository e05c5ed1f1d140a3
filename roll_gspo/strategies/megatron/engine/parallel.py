"""The process group of this rank's role, and megatron's groups on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore
from torch.distributed import ProcessGroup

from roll_gspo.errors import ConfigError
from roll_gspo.rendezvous import group_backend
from roll_gspo.strategies.megatron.config import MegatronConfig


def initialize_parallel(config: MegatronConfig, seed: int) -> None:
    """Create megatron's groups of this process once, on the default process group (a world of one if there is none).

    Roles of one process share the groups, because they have the layout of a single rank.

    Raises:
        ConfigError: the world has another size than the layout, or another layout is in use in this process.
    """
    if not dist.is_initialized():
        # a store in memory: a group of one process needs no port
        dist.init_process_group(group_backend(), store=HashStore(), rank=0, world_size=1)
    if parallel_state.model_parallel_is_initialized():
        if _in_use() != _wanted(config):
            raise ConfigError(
                f"strategy_config: a role of this process has the layout {_in_use()} (TP, PP, CP, EP), this one wants "
                f"{_wanted(config)}; give each role separate processes with execution: ray"
            )
        return
    _check_world(config)
    parallel_state.initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
    )
    # megatron's tracker of parallel RNG states must exist; it also seeds torch, which is reverted here
    state = torch.get_rng_state()
    model_parallel_cuda_manual_seed(seed)
    torch.set_rng_state(state)


def tensor_group() -> ProcessGroup:
    """Return the ranks that share each matrix with this one."""
    group: Any = parallel_state.get_tensor_model_parallel_group()  # megatron's annotations are too wide
    return group


def expert_tensor_group() -> ProcessGroup:
    """Return the ranks that share each expert matrix with this one."""
    group: Any = parallel_state.get_expert_tensor_parallel_group()
    return group


def pipeline_group() -> ProcessGroup:
    """Return the stages of one pipeline."""
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    return group


def expert_group() -> ProcessGroup:
    """Return the ranks that split the experts of their layers."""
    group: Any = parallel_state.get_expert_model_parallel_group()
    return group


def context_group() -> ProcessGroup:
    """Return the ranks that share each sample with this one."""
    group: Any = parallel_state.get_context_parallel_group()
    return group


def _wanted(config: MegatronConfig) -> tuple[int, int, int, int]:
    return (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.context_parallel_size,
        config.expert_model_parallel_size,
    )


def _in_use() -> tuple[int, int, int, int]:
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )


def _check_world(config: MegatronConfig) -> None:
    ranks, copy = dist.get_world_size(), config.model_parallel_size
    if ranks % copy:
        raise ConfigError(
            f"device_mapping: {ranks} rank(s) are not a multiple of the {copy} that one copy of the model takes "
            "(tensor * pipeline * context parallel size in strategy_config); change one"
        )
