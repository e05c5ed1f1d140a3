"""Engines: one class per `strategy_name`, each with the `strategy_config` keys that it honours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from roll_gspo.config.base import Problem, Schema, used_only_with


class MegatronConfig(Schema):
    """`strategy_config` of `megatron_train` and `megatron_infer`; names are megatron-core's."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each weight matrix."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Ranks that share the stack of layers."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Interleaved pipeline chunks a rank."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts of a mixture-of-experts layer."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that share each expert's matrices; null: as `tensor_model_parallel_size`. Mixtures of experts only."""
    sequence_parallel: bool = False
    """Cut norms and dropouts over the tensor-parallel ranks too."""
    use_sequence_packing: bool = False
    """Lay the samples of a micro-batch one after the other, without padding."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass instead of keeping them."""
    recompute_method: Literal["uniform", "block"] | None = None
    """How layers are chosen for `recompute_granularity: full`."""
    recompute_num_layers: PositiveInt | None = None
    """How many layers a recomputed unit has."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to their experts; mixtures of experts only."""
    moe_grouped_gemm: bool = False
    """Run the experts of a layer as one grouped matrix product; needs TransformerEngine."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert's matrices, whichever key says so."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_copy_size(self) -> int:
        """Ranks that hold all experts of the model together."""
        return self.expert_tensor_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    def broken_rules(self) -> Iterator[Problem]:
        """What no model and no number of ranks makes possible."""
        yield from super().broken_rules()
        yield from self._broken_parallel_rules()
        yield from self._broken_recompute_rules()

    def _broken_parallel_rules(self) -> Iterator[Problem]:
        tensor, pipeline = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        virtual, expert_tensor = self.virtual_pipeline_model_parallel_size, self.expert_tensor_parallel_size
        if virtual is not None and pipeline == 1:
            yield Problem(
                "virtual_pipeline_model_parallel_size",
                f"{virtual} splits pipeline stages, and there is one; set it to null, or pipeline_model_parallel_size "
                "to 2 or more",
                ("pipeline_model_parallel_size",),
            )
        elif virtual == 1:
            message = "1 splits no stage; set it to null, or to 2 or more"
            yield Problem("virtual_pipeline_model_parallel_size", message)
        if self.sequence_parallel and tensor == 1:
            yield Problem(
                "sequence_parallel",
                "true splits positions over tensor-parallel ranks, and there is one; set it to false, or "
                "tensor_model_parallel_size to 2 or more",
                ("tensor_model_parallel_size",),
            )
        if self.expert_model_parallel_size == 1 and expert_tensor not in (None, tensor):
            yield Problem(
                "expert_tensor_parallel_size",
                f"{expert_tensor} with tensor_model_parallel_size {tensor} and expert_model_parallel_size 1: megatron "
                "would not sum the experts' gradients over all ranks that hold them; set it to null, or "
                "expert_model_parallel_size to 2 or more",
                ("tensor_model_parallel_size", "expert_model_parallel_size"),
            )
        if self.moe_token_dispatcher_type == "allgather" and pipeline > 1:
            yield Problem(
                "moe_token_dispatcher_type",
                f"allgather with pipeline_model_parallel_size {pipeline} cannot process micro-batches of different "
                "lengths; set alltoall",
                ("pipeline_model_parallel_size",),
            )

    def _broken_recompute_rules(self) -> Iterator[Problem]:
        if self.recompute_granularity == "full" and not (self.recompute_method and self.recompute_num_layers):
            yield Problem(
                "recompute_granularity",
                "full needs recompute_method and recompute_num_layers; add 'recompute_method: uniform' and "
                "'recompute_num_layers: 1'",
                ("recompute_method", "recompute_num_layers"),
            )
        for key, value in (
            ("recompute_method", self.recompute_method),
            ("recompute_num_layers", self.recompute_num_layers),
        ):
            if value and self.recompute_granularity != "full":
                yield used_only_with(key, "recompute_granularity", "full")


class HfConfig(Schema):
    """`strategy_config` of `hf_train` and `hf_infer`: plain transformers and torch."""

    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """Attention kernel of the transformers model."""
    generate_batch_size: PositiveInt = 256
    """Samples that are decoded together when this engine generates."""


def generating_keys(config: HfConfig, block: str) -> Iterator[Problem]:
    """Yield keys of generation that are set for an engine that never generates."""
    if config.generate_batch_size != HfConfig.model_fields["generate_batch_size"].default:
        message = "is used only if the engine generates (actor_infer); remove it"
        yield Problem(f"{block}.generate_batch_size", message)


class VllmConfig(Schema):
    """`strategy_config` of `vllm`; names are vLLM's."""

    tensor_parallel_size: PositiveInt = 1
    """Devices that share one engine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of GPU memory for weights and KV cache; means nothing on a CPU."""
    kv_cache_memory_mb: PositiveInt | None = None
    """Fixed size of the KV cache; null: on a CPU what `max_num_seqs` full sequences need (up to 4 GiB or a quarter of
    the free memory), else vLLM's own."""
    max_num_seqs: PositiveInt = 256
    """Sequences decoded together."""
    max_num_batched_tokens: PositiveInt | None = None
    """Tokens in one engine step; null: vLLM's default. On a CPU at least a whole sequence: none is cut there."""
    enforce_eager: bool | None = None
    """Skip graph capture and compilation; null: true on a CPU, false on a GPU."""
    enable_prefix_caching: bool = True
    """Reuse the KV cache of shared prompt prefixes within one weights version."""
    load_format: Literal["dummy", "auto"] = "dummy"
    """`dummy` starts with random weights, so that a tensor the first transfer misses cannot go unnoticed."""


class MegatronTrainArgs(Schema):
    """Train with megatron-core."""

    strategy_name: Literal["megatron_train"]
    """Engine."""
    strategy_config: MegatronConfig = MegatronConfig()
    """Layout and memory of the engine."""


class MegatronInferArgs(Schema):
    """Score tokens with megatron-core."""

    strategy_name: Literal["megatron_infer"]
    """Engine."""
    strategy_config: MegatronConfig = MegatronConfig()
    """Layout of the engine."""

    def broken_rules(self) -> Iterator[Problem]:
        """What only training does."""
        yield from super().broken_rules()
        c = self.strategy_config
        for key, value in (
            ("use_distributed_optimizer", c.use_distributed_optimizer),
            ("overlap_grad_reduce", c.overlap_grad_reduce),
            ("recompute_granularity", c.recompute_granularity),
        ):
            if value:
                message = "is used only with megatron_train (megatron_infer has no gradients); remove it"
                yield Problem(f"strategy_config.{key}", message, ("strategy_name",))


class HfTrainArgs(Schema):
    """Train with plain transformers: the readable reference implementation."""

    strategy_name: Literal["hf_train"]
    """Engine."""
    strategy_config: HfConfig = HfConfig()
    """Options of the engine."""

    def broken_rules(self) -> Iterator[Problem]:
        """What only a generating engine does."""
        yield from super().broken_rules()
        yield from generating_keys(self.strategy_config, "strategy_config")


class HfInferArgs(Schema):
    """Score or generate with plain transformers."""

    strategy_name: Literal["hf_infer"]
    """Engine."""
    strategy_config: HfConfig = HfConfig()
    """Options of the engine."""


class VllmArgs(Schema):
    """Generate with vLLM."""

    strategy_name: Literal["vllm"]
    """Engine."""
    strategy_config: VllmConfig = VllmConfig()
    """Size and behaviour of the engine."""


TrainStrategyArgs = Annotated[MegatronTrainArgs | HfTrainArgs, Field(discriminator="strategy_name")]
ScoreStrategyArgs = Annotated[MegatronInferArgs | HfInferArgs, Field(discriminator="strategy_name")]
GenerateStrategyArgs = Annotated[VllmArgs | HfInferArgs, Field(discriminator="strategy_name")]
STRATEGY_NAMES = ("megatron_train", "hf_train", "megatron_infer", "hf_infer", "vllm")
