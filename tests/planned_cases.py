"""Build every rank of a layout with megatron on fake process groups and the meta device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.megatron.config import MegatronConfig


class Built(NamedTuple):
    """A rank: parameters, ranks that share the optimizer of either kind, stage, and bytes of (weights, gradients,
    optimizer) as megatron allocates them."""

    shared: int
    experts: int
    shares: tuple[int, int]
    stage: int
    allocated: tuple[int, int, int] | None


def build_ranks(model: Architecture, config: MegatronConfig, world_size: int, allocate: bool) -> list[Built]:
    """Build every rank.

    Args:
        model: the model.
        config: its layout.
        world_size: number of ranks.
        allocate: wrap the model for data parallelism and build the optimizer, too.

    To be called in a process that has not imported megatron.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from roll_gspo.strategies.megatron.engine import compat
    from roll_gspo.strategies.megatron.engine.model import _build_chunk, transformer_config

    device = torch.device("cpu" if allocate else "meta")  # the optimizer refuses parameters without data
    vars(compat._Loader.stand_in.cuda)["current_device"] = lambda: device
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
        with device:
            stages = [None] if virtual is None else range(virtual)
            chunks = [_build_chunk(model, megatron_config, stage) for stage in stages]
        counts = {False: 0, True: 0}
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                assert parameter.device == device, name
                counts[".experts." in name] += parameter.numel()
        shares = (
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            parallel_state.get_expert_data_parallel_world_size(),
        )
        stage = parallel_state.get_pipeline_model_parallel_rank()
        allocated = _allocated(chunks, megatron_config, config) if allocate else None
        built.append(Built(counts[False], counts[True], shares, stage, allocated))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return built


def _allocated(chunks: list[Any], megatron_config: Any, config: MegatronConfig) -> tuple[int, int, int]:
    """Return the bytes of weights, gradient buffers and optimizer state after the first step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.use_distributed_optimizer
    )
    wrapped = [DistributedDataParallel(megatron_config, settings, chunk) for chunk in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-6,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=config.use_distributed_optimizer,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    weights = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    buffers = [buffer for ddp in wrapped for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    mains = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(parameter.dtype == torch.float32 for parameter in mains)
    return weights, gradients, sum(3 * parameter.nbytes for parameter in mains)  # the copy and two moments


def build_all(cases: list[tuple[Architecture, MegatronConfig, int, bool]]) -> list[list[Built]]:
    """Run `build_ranks` for several layouts in one process."""
    return [build_ranks(*case) for case in cases]
