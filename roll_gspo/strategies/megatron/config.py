"""The options of the megatron-core engine, and the rules that hold for every model and number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import PositiveInt

from roll_gspo.config.base import Problem, Schema, used_only_with


class MegatronConfig(Schema):
    """`strategy_config` of `megatron_train` and `megatron_infer`; the names are megatron-core's."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each weight matrix."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Ranks that share the stack of layers."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Interleaved pipeline chunks per rank."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts of a mixture-of-experts layer."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that share each expert's matrices; null: as `tensor_model_parallel_size`. Mixtures of experts only."""
    sequence_parallel: bool = False
    """Cut norms and dropouts over the tensor-parallel ranks too."""
    use_sequence_packing: bool | None = None
    """Lay the samples of a micro-batch one after the other, without padding. null: on GPUs, unless `router_replay` is
    on. Results do not change."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass instead of keeping them."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Selection of layers for `recompute_granularity: full`; if omitted with it, `uniform`."""
    recompute_num_layers: PositiveInt | None = None
    """Layers per recomputed unit; if omitted with `recompute_method: uniform`, 1: every layer is recomputed."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """Collective that dispatches tokens to experts; mixtures of experts only. `flex` needs DeepEP."""
    moe_grouped_gemm: bool = False
    """Run the experts of a layer as one grouped matrix product; needs TransformerEngine."""
    moe_permute_fusion: bool = False
    """Permute the tokens of experts in one kernel; needs TransformerEngine 2.1 or later."""
    moe_router_fusion: bool = False
    """Choose experts in one kernel; needs TransformerEngine 2.7 or later."""
    bias_activation_fusion: bool | None = None
    """Compute the activation of feed-forward layers in one kernel. null: on GPUs."""
    bias_dropout_fusion: bool | None = None
    """Add residuals in one kernel. null: on GPUs."""
    apply_rope_fusion: bool | None = None
    """Compute rotary embeddings in one kernel; needs TransformerEngine. null: on GPUs if it is installed."""
    gradient_accumulation_fusion: bool | None = None
    """Add gradients of weights to their buffer inside the matrix product; needs apex's extension
    `fused_weight_gradient_mlp_cuda`. null: on GPUs if it is installed."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in float32; false: in the dtype of the model, with half the memory in 16 bits."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs `use_distributed_optimizer` and
    `overlap_grad_reduce`."""
    fp32_lm_head: bool | None = None
    """Compute logits in float32 from 16-bit hidden states and weights; null: on if `dtype` has 16 bits."""
    fused_head: Literal["auto", "torch", "triton"] = "auto"
    """Kernel of log-probs and entropies; auto: `triton` for 16-bit dtypes on a GPU if it is installed, else `torch`."""

    @classmethod
    def fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Recompute every layer if `recompute_granularity: full` selects no layers."""
        values = super().fill_defaults(values)
        if values.get("recompute_granularity") == "full" and not values.get("recompute_method"):
            values["recompute_method"] = "uniform"
        if values.get("recompute_granularity") == "full" and values["recompute_method"] == "uniform":
            values["recompute_num_layers"] = values.get("recompute_num_layers") or 1
        return values

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that hold one copy of the model together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Number of ranks that share each expert's matrices, from whichever key is set."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def expert_copy_size(self) -> int:
        """Number of ranks that hold all experts of the model together."""
        return self.expert_tensor_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    def broken_rules(self) -> Iterator[Problem]:
        """Yield settings that are invalid for every model and number of ranks."""
        yield from super().broken_rules()
        yield from self._broken_parallel_rules()
        yield from self._broken_recompute_rules()
        needed = {key: getattr(self, key) for key in ("use_distributed_optimizer", "overlap_grad_reduce")}
        if self.overlap_param_gather and (missing := [key for key, value in needed.items() if not value]):
            message = f"true needs {' and '.join(f'{key}: true' for key in missing)}; add it, or set this key to false"
            yield Problem("overlap_param_gather", message, tuple(missing))

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
        if self.recompute_granularity == "full" and not self.recompute_num_layers:
            message = "block needs recompute_num_layers; add it, or set recompute_method: uniform"
            yield Problem("recompute_method", message, ("recompute_num_layers",))
        for key, value in (
            ("recompute_method", self.recompute_method),
            ("recompute_num_layers", self.recompute_num_layers),
        ):
            if value and self.recompute_granularity != "full":
                yield used_only_with(key, "recompute_granularity", "full")
