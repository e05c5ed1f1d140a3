"""The options of the vLLM engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from roll_gspo.config.base import Schema


class VllmConfig(Schema):
    """`strategy_config` of `vllm`; names are vLLM's."""

    tensor_parallel_size: PositiveInt = 1
    """Devices that share one engine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of GPU memory for weights and KV cache; means nothing on a CPU."""
    kv_cache_memory_mb: PositiveInt | None = None
    """Fixed size of the KV cache; null: on a CPU what `max_num_seqs` full sequences need (up to 4 GiB or a quarter of
    the free memory), else vLLM's own."""
    max_num_seqs: PositiveInt | None = None
    """Sequences decoded together; null: 256 on a CPU, vLLM's default for the device on a GPU (1,024 on an H100)."""
    max_num_batched_tokens: PositiveInt | None = None
    """Tokens in one engine step; null: vLLM's default. On a CPU at least a whole sequence: none is cut there."""
    enforce_eager: bool | None = None
    """Skip graph capture and compilation; null: true on a CPU, false on a GPU."""
    enable_prefix_caching: bool = True
    """Reuse the KV cache of shared prompt prefixes within one weights version."""
    batch_invariant: bool = False
    """Use vLLM's batch-invariant kernels (VLLM_BATCH_INVARIANT): log-probs do not depend on the other sequences of a
    batch in bf16 either. Slower; needs `execution: ray` and GPUs with compute capability 8.0 or above."""
    fp32_lm_head: bool | None = None
    """Compute logits in float32 from 16-bit hidden states and weights; null: on if `dtype` has 16 bits."""
    load_format: Literal["dummy", "auto"] = "dummy"
    """`dummy` starts with random weights, so that a tensor the first transfer misses cannot go unnoticed."""
