"""The parts of a megatron trainer that leave the device between phases.

megatron-core 0.16 moves parameters only with the distributed optimizer, and its optimizer state is not in pinned
memory. Here all memory is found from the tensors, so that every optimizer works. `DistributedDataParallel` keeps its
views: megatron frees gradient buffers in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from roll_gspo.strategies.offload import EngineState, Part, outside


def weight_tensors(chunks: Sequence[GPTModel]) -> list[Tensor]:
    """Return parameters and buffers of all layers. A distributed optimizer keeps parameters in common buffers."""
    return [tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers())]


def trainer_state(
    chunks: Sequence[GPTModel],
    wrapped: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    before_leaving: Callable[[], None],
) -> EngineState:
    """Return the movable state of a trainer.

    Args:
        chunks: layers of this rank.
        wrapped: their data-parallel wrappers, which hold the gradients. These are 0 between updates.
        optimizer: holds master weights and moments.
        before_leaving: completes the communication of the last step.
    """
    gradients = Part(lambda: gradient_buffers(wrapped), "zeros")
    moments = Part(
        lambda: outside(_optimizer_tensors(optimizer), [*weight_tensors(chunks), *gradient_buffers(wrapped)])
    )
    return EngineState("megatron_train", Part(lambda: weight_tensors(chunks)), [moments, gradients], before_leaving)


def gradient_buffers(wrapped: Sequence[DistributedDataParallel]) -> list[Tensor]:
    """Return the gradient buffers, those of experts included."""
    modules: list[Any] = list(wrapped)  # their `buffers` replace those of torch's modules
    return [buffer.grad_data for ddp in modules for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]


def _optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Yield master weights and moments of every optimizer of this rank."""
    for part in optimizer.chained_optimizers:  # type: ignore[attr-defined]
        inner: Any = part.optimizer
        if inner is None:  # this rank has no such parameters
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for moments in inner.state.values():
            yield from (value for value in moments.values() if isinstance(value, Tensor))
