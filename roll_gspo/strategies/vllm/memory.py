"""Memory of a vLLM engine on one GPU (no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from roll_gspo.config.lora import LoraArgs
from roll_gspo.config.memory import Alternative, GenerationBytes
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.size import adapter_parameters
from roll_gspo.strategies.memory import kv_bytes_per_token
from roll_gspo.strategies.vllm.config import VllmConfig

# vLLM 0.32's defaults for GPUs with at least 70 GiB (`vllm/engine/arg_utils.py`)
_BATCHED_TOKENS, _SEQUENCES = 16384, 1024
_SAMPLING_COPIES = 3  # float32 logits, log-probs and the sorted or masked copy of a step's samples
_SHARES = range(20, 95, 5)  # per cent of the device
_MAX_TENSOR = 8
_TENSOR = 3  # cost of doubling the devices of an engine
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM allocates adapters of (`MaxLoRARanks` in `vllm/config/lora.py`)."""
_MERGED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # one layer in vLLM
GRAPHS = 2**30  # CUDA graphs and the workspaces of kernels; about this much with the default sizes


def generation_bytes(
    model: Architecture, config: VllmConfig, weights: float, device: float, itemsize: int
) -> GenerationBytes:
    """Return what an engine takes on one device besides its weights.

    vLLM fills `gpu_memory_utilization` of the device: the KV cache gets what weights, activations and CUDA graphs leave
    (`vllm/v1/worker/gpu_worker.py`, `determine_available_memory`). `kv_cache_memory_mb` replaces this.

    Args:
        model: the model.
        config: options of the engine.
        weights: bytes of the weights on the device, and of adapters.
        device: bytes of the device.
        itemsize: bytes of a weight, an activation and a cached number.
    """
    shards = config.tensor_parallel_size
    columns = model.intermediate_size
    if model.experts is not None:
        columns = model.experts.num_experts_per_token * (model.experts.intermediate_size + model.hidden_size)
    numbers = 2 * model.hidden_size + 3 * columns / shards
    working = (config.max_num_batched_tokens or _BATCHED_TOKENS) * numbers * itemsize
    working += 4 * _SAMPLING_COPIES * (config.max_num_seqs or _SEQUENCES) * model.vocab_size
    asleep = 0.0 if config.enforce_eager else float(GRAPHS)
    working += asleep
    if config.kv_cache_memory_mb is not None:
        kv_cache = float(config.kv_cache_memory_mb * 2**20)
    else:
        kv_cache = max(config.gpu_memory_utilization * device - weights - working, 0.0)
    return GenerationBytes(kv_cache, working, asleep, int(kv_cache / kv_bytes_per_token(model, itemsize, shards)))


def alternatives(config: VllmConfig, num_devices: int) -> Iterator[Alternative]:
    """Yield other sizes of the KV cache and larger tensor-parallel sizes.

    Args:
        config: the present options.
        num_devices: devices of all engines.
    """
    caches: list[Alternative] = [Alternative(0, {})]
    if config.kv_cache_memory_mb is not None:
        sizes = ((cost, config.kv_cache_memory_mb >> cost) for cost in range(1, 6))
        caches += [Alternative(cost, {"kv_cache_memory_mb": size}) for cost, size in sizes if size]
    else:
        present = config.gpu_memory_utilization
        shares = (share / 100 for share in _SHARES)
        caches += [
            Alternative(20 * abs(share - present), {"gpu_memory_utilization": share})
            for share in shares
            if share != present
        ]
    tensor, doublings = config.tensor_parallel_size, 0
    while tensor <= _MAX_TENSOR and num_devices % tensor == 0:
        size: dict[str, Any] = {"tensor_parallel_size": tensor} if doublings else {}
        for cost, changes in caches:
            if size or changes:
                yield Alternative(cost + _TENSOR * doublings, {**size, **changes})
        tensor, doublings = 2 * tensor, doublings + 1


def slot_rank(rank: int) -> int | None:
    """Return the rank that vLLM allocates for an adapter of this rank; None if it is too large."""
    return next((size for size in ADAPTER_RANKS if size >= rank), None)


def adapter_slots(versions: int) -> int:
    """Return the number of adapters that an engine holds: the newest one is loaded before the oldest one is freed."""
    return versions + 1


def adapter_bytes(model: str, lora: LoraArgs, versions: int, itemsize: int) -> float:
    """Return the bytes of the adapters on one device, which vLLM allocates for the rank of `slot_rank`.

    Layers that vLLM merges are adapted together. Matrices count as unsharded, which is too much under tensor
    parallelism.

    Args:
        model: Hugging Face name or folder, or a `builtin:` name.
        lora: the adapter.
        versions: versions that may have requests at the same time.
        itemsize: bytes of a number.
    """
    names = {name.rpartition(".")[2] for name in lora.target_modules}
    for merged in _MERGED:
        names |= merged if names & merged else set()
    numbers = adapter_parameters(model, slot_rank(lora.rank) or lora.rank, sorted(names)) or 0
    return float(numbers * adapter_slots(versions) * itemsize)
