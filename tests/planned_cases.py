"""Build every rank of a layout with megatron on fake process groups and the meta device."""

from __future__ import annotations

import torch
import torch.distributed as dist

from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.megatron.config import MegatronConfig

Built = tuple[int, int, tuple[int, int], int]


def build_ranks(model: Architecture, config: MegatronConfig, world_size: int) -> list[Built]:
    """Return (dense parameters, expert parameters, optimizer shards of either, pipeline stage) by rank.

    To be called in a process that has not imported megatron.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from roll_gspo.strategies.megatron.engine import compat
    from roll_gspo.strategies.megatron.engine.model import _build_chunk, transformer_config

    vars(compat._Loader.stand_in.cuda)["current_device"] = lambda: torch.device("meta")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    megatron_config = transformer_config(model, torch.bfloat16, config)
    virtual = config.virtual_pipeline_model_parallel_size
    built = []
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        parallel_state.initialize_model_parallel(
            config.tensor_model_parallel_size,
            config.pipeline_model_parallel_size,
            virtual,
            context_parallel_size=config.context_parallel_size,
            expert_model_parallel_size=config.expert_model_parallel_size,
            expert_tensor_parallel_size=config.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(0)
        with torch.device("meta"):
            stages = [None] if virtual is None else range(virtual)
            chunks = [_build_chunk(model, megatron_config, stage) for stage in stages]
        counts = {False: 0, True: 0}
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                assert parameter.is_meta, name
                counts[".experts." in name] += parameter.numel()
        shares = (
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            parallel_state.get_expert_data_parallel_world_size(),
        )
        built.append((counts[False], counts[True], shares, parallel_state.get_pipeline_model_parallel_rank()))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return built


def build_all(cases: list[tuple[Architecture, MegatronConfig, int]]) -> list[list[Built]]:
    """Run `build_ranks` for several layouts in one process."""
    return [build_ranks(*case) for case in cases]
