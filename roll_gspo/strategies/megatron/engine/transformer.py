"""megatron's description of a model: architecture, layout and kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP
from torch import Tensor

from roll_gspo.config.base import Problem
from roll_gspo.errors import ConfigError
from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.fused_scores import has_triton
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.engine.attention import HAVE_TE, uses_transformer_engine
from roll_gspo.strategies.megatron.layout import layout_problems, transformer_engine_problems


def refuse_layout(config: MegatronConfig, architecture: Architecture) -> None:
    """Reject layouts that are unsupported or would train incorrectly, given the model and the ranks.

    Raises:
        ConfigError: names every key.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    on_cuda = torch.cuda.is_available()
    problems = list(layout_problems(architecture, config, world_size, on_cuda))
    if on_cuda and not HAVE_TE:
        problems += transformer_engine_problems(config)
    if config.fused_head == "triton" and not has_triton():
        problems.append(Problem("fused_head", "triton is not installed; set auto, or run: pip install triton"))
    if on_cuda and config.gradient_accumulation_fusion and not layers._grad_accum_fusion_available:
        message = "true needs apex's fused_weight_gradient_mlp_cuda, which is not installed; set it to null"
        problems.append(Problem("gradient_accumulation_fusion", message))
    if on_cuda and config.moe_token_dispatcher_type == "flex" and not HAVE_DEEP_EP:
        message = "flex needs DeepEP (deep_ep), which is not installed; set it to alltoall"
        problems.append(Problem("moe_token_dispatcher_type", message))
    if problems:
        raise ConfigError("\n".join(f"strategy_config.{problem.key}: {problem.message}" for problem in problems))


# checkpoint name of the gate's activation -> function
_ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


def _leave(weight: Tensor) -> Tensor:
    """Initialise nothing, because every parameter is read from the checkpoint."""
    return weight


def transformer_config(model: Architecture, dtype: torch.dtype, config: MegatronConfig) -> TransformerConfig:
    """Return megatron's description of the model and of its computation."""
    family = model.family
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        layernorm_zero_centered_gamma=family.zero_centered_norms,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[family.activation],
        rotary_interleaved=family.interleaved_rotary,
        softmax_scale=None if model.query_size is None else model.query_size**-0.5,
        window_size=None if model.window is None else (model.window - 1, 0),  # tokens to the left and to the right
        window_attn_skip_freq=[int(size is not None) for size in model.windows] or None,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=True,  # also marks how parameters are split; the initialisers below do nothing
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        masked_softmax_fusion=False,  # of an attention that is not used here: every kernel has its softmax
        persist_layer_norm=False,
        # loss functions return shares that are summed, so megatron must not divide by the number of micro-batches
        calculate_per_token_loss=True,
        recompute_granularity=config.recompute_granularity,
        recompute_method=config.recompute_method,
        recompute_num_layers=config.recompute_num_layers,
        **_kernels(model, config),
        **_parallel_settings(config),
        **_expert_settings(model, config),
    )


def _kernels(model: Architecture, config: MegatronConfig) -> dict[str, bool]:
    """Return which kernels are fused. megatron compiles those of activations and residuals with torch.compile."""
    on_cuda = torch.cuda.is_available()
    available = {
        "bias_activation_fusion": on_cuda and model.family.activation == "silu",
        "bias_dropout_fusion": on_cuda,
        "apply_rope_fusion": uses_transformer_engine(),
        "gradient_accumulation_fusion": on_cuda and layers._grad_accum_fusion_available,
    }
    chosen = {key: getattr(config, key) for key in available}
    return {key: available[key] if value is None else value for key, value in chosen.items()}


def _parallel_settings(config: MegatronConfig) -> dict[str, Any]:
    virtual = config.virtual_pipeline_model_parallel_size
    return {
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": config.context_parallel_size,
        "expert_model_parallel_size": config.expert_model_parallel_size,
        "expert_tensor_parallel_size": config.expert_tensor_parallel_size,
        "sequence_parallel": config.sequence_parallel,
        # stages exchange the shape of every micro-batch
        "variable_seq_lengths": config.pipeline_model_parallel_size > 1,
        # with two stages the next rank is also the previous one: batched messages of virtual stages would mix
        "overlap_p2p_comm": virtual is not None,
        "batch_p2p_comm": virtual is None,
    }


def _expert_settings(model: Architecture, config: MegatronConfig) -> dict[str, Any]:
    if model.experts is None:
        return {"moe_token_dispatcher_type": "alltoall"}  # megatron reads it for dense models, too
    return {
        "num_moe_experts": model.experts.num_experts,
        "moe_router_topk": model.experts.num_experts_per_token,
        "moe_ffn_hidden_size": model.experts.intermediate_size,
        # softmax over the chosen experts equals the renormalised softmax over all
        "moe_router_pre_softmax": not model.experts.normalize_top_k,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "moe_token_dispatcher_type": config.moe_token_dispatcher_type,
        "moe_permute_fusion": config.moe_permute_fusion,
        "moe_router_fusion": config.moe_router_fusion,
    }
