"""Megatron layouts: validity for a model and its ranks, and parameters per rank (no torch).

Ranks are numbered tensor-parallel first, then context, data and pipeline, so that the ranks of a pipeline stage are
consecutive. Legend of the formulas: H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from roll_gspo.config.base import Problem
from roll_gspo.config.suggestions import nearest, nearest_multiples, set_key
from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.megatron.config import MegatronConfig

_TENSOR = "tensor_model_parallel_size"
_PIPELINE = "pipeline_model_parallel_size"
_VIRTUAL = "virtual_pipeline_model_parallel_size"
_EXPERT = "expert_model_parallel_size"
_EXPERT_TENSOR = "expert_tensor_parallel_size"
_DISPATCHER = "moe_token_dispatcher_type"
_GROUPED = "moe_grouped_gemm"
# Keys that need TransformerEngine if they are true, with the value that switches each off.
_NEEDS_ENGINE = {_GROUPED: "false", "moe_permute_fusion": "false", "moe_router_fusion": "false"}
_NEEDS_ENGINE |= {"apply_rope_fusion": "null"}


def layout_problems(
    model: Architecture | None, config: MegatronConfig, world_size: int, on_cuda: bool | None
) -> Iterator[Problem]:
    """Yield reasons why a role cannot have a layout, besides the rules of `MegatronConfig` itself.

    Args:
        model: the model; if None (not known yet), only the number of ranks is checked.
        config: the layout.
        world_size: ranks of the role.
        on_cuda: True if they compute on GPUs, None if not known yet.

    Returns:
        Problems of keys of `strategy_config`; each message ends with the nearest valid choice.
    """
    yield from _world_problems(config, world_size)
    yield from _backend_problems(config, on_cuda)
    if model is not None:
        yield from _model_problems(model, config, world_size)
        yield from _recompute_problems(model, config)
        yield from _family_problems(model, config, on_cuda)
        yield from _expert_problems(model, config, world_size) if model.experts else _dense_problems(config)


def transformer_engine_problems(config: MegatronConfig) -> Iterator[Problem]:
    """Yield the settings that need TransformerEngine, for a machine without it."""
    for key, off in _NEEDS_ENGINE.items():
        if getattr(config, key):
            yield Problem(
                key,
                "true needs TransformerEngine, which is not installed; run pip install --no-build-isolation "
                f"'roll-gspo[te]' on every machine, or set it to {off}",
            )


def _world_problems(config: MegatronConfig, world_size: int) -> Iterator[Problem]:
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    context, copy = config.context_parallel_size, config.model_parallel_size
    if world_size % copy:
        valid = [size for size in range(1, world_size + 1) if world_size % (size * pipeline * context) == 0]
        also = f", or this key to {nearest(tensor, valid)}" if valid else ""
        yield Problem(
            _TENSOR,
            f"{tensor} * {_PIPELINE} {pipeline} * context_parallel_size {context} = {copy} ranks hold one copy of the "
            f"model, and {world_size} rank(s) are not a multiple; set device_mapping to "
            f"{nearest_multiples(world_size, copy)} devices{also}",
        )
    elif world_size % config.expert_copy_size:
        expert, expert_tensor = config.expert_model_parallel_size, config.expert_tensor_size
        valid = [size for size in range(1, world_size + 1) if world_size % (size * expert_tensor * pipeline) == 0]
        choice = f"set it to {nearest(expert, valid)}"
        if expert_tensor > 1 and expert > 1 and world_size % (expert * pipeline) == 0:
            choice = f"set {_EXPERT_TENSOR}: 1, or {_EXPERT} to {nearest(expert, valid)}"
        yield Problem(
            _EXPERT,
            f"{expert} * {_EXPERT_TENSOR} {expert_tensor} * {_PIPELINE} {pipeline} = {config.expert_copy_size} ranks "
            f"hold one copy of the experts, and {world_size} rank(s) are not a multiple; {choice}",
        )


def _backend_problems(config: MegatronConfig, on_cuda: bool | None) -> Iterator[Problem]:
    """Yield what gloo and CPUs do not support."""
    if on_cuda is not False:
        return
    for key, off in _NEEDS_ENGINE.items():
        if getattr(config, key):
            yield Problem(key, f"true needs CUDA and TransformerEngine; set it to {off}")
    if config.gradient_accumulation_fusion:
        yield Problem("gradient_accumulation_fusion", "true needs CUDA and apex; set it to null")
    if config.moe_token_dispatcher_type == "flex":
        yield Problem(_DISPATCHER, "flex needs CUDA and DeepEP; set it to alltoall")
    if config.fused_head == "triton":
        yield Problem("fused_head", "triton needs CUDA; set auto, or torch")
    expert, expert_tensor = config.expert_model_parallel_size, config.expert_tensor_size
    if expert > 1 and expert_tensor > 1 and config.moe_token_dispatcher_type == "alltoall":
        yield Problem(
            _DISPATCHER,
            f"alltoall with {_EXPERT} {expert} and {_EXPERT_TENSOR} {expert_tensor} gathers shares of different "
            f"sizes, which gloo (CPU) does not support; set {_EXPERT_TENSOR}: 1",
        )


def _model_problems(model: Architecture, config: MegatronConfig, world_size: int) -> Iterator[Problem]:
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    split = {"attention heads": model.num_attention_heads, "key/value heads": model.num_key_value_heads}
    if model.experts is None:
        split["columns of intermediate_size"] = model.intermediate_size
    if wrong := [f"{size} {what}" for what, size in split.items() if size % tensor]:
        others = pipeline * config.context_parallel_size

        def works(size: int) -> bool:
            return all(number % size == 0 for number in split.values()) and world_size % (size * others) == 0

        choice = set_key(_TENSOR, tensor, works)
        yield Problem(_TENSOR, f"{tensor} does not divide {' and '.join(wrong)}; {choice}")
    virtual = config.virtual_pipeline_model_parallel_size or 1
    if model.num_layers % pipeline:
        others = tensor * config.context_parallel_size
        choice = set_key(
            _PIPELINE,
            pipeline,
            lambda size: model.num_layers % (size * virtual) == 0 and world_size % (size * others) == 0,
        )
        yield Problem(_PIPELINE, f"{pipeline} does not divide {model.num_layers} layers; {choice}")
    elif model.num_layers % (pipeline * virtual):
        choice = set_key(
            _VIRTUAL, virtual, lambda size: size > 1 and model.num_layers % (pipeline * size) == 0, otherwise="null"
        )
        yield Problem(
            _VIRTUAL,
            f"{virtual} * {_PIPELINE} {pipeline} = {virtual * pipeline} does not divide {model.num_layers} layers; "
            f"{choice}",
        )


def _family_problems(model: Architecture, config: MegatronConfig, on_cuda: bool | None) -> Iterator[Problem]:
    """Yield what a layout does not support for the layers of some families."""
    if config.bias_activation_fusion and model.family.activation != "silu":
        message = f"true has no kernel for the activation {model.family.activation}; set it to null"
        yield Problem("bias_activation_fusion", message)
    if on_cuda and model.window is not None and config.context_parallel_size > 1:
        yield Problem(
            "context_parallel_size",
            f"{config.context_parallel_size} with a sliding window of {model.window} tokens: TransformerEngine's ring "
            "attention has no window; set it to 1",
        )


def _recompute_problems(model: Architecture, config: MegatronConfig) -> Iterator[Problem]:
    """Yield recomputed units that do not divide the layers of a pipeline chunk; megatron-core fails on the last one."""
    chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    layers, unit = model.num_layers // chunks, config.recompute_num_layers or 1
    if config.recompute_method == "uniform" and model.num_layers % chunks == 0 and layers % unit:
        choice = set_key("recompute_num_layers", unit, lambda number: number <= layers and layers % number == 0)
        yield Problem("recompute_num_layers", f"{unit} does not divide the {layers} layers of a rank; {choice}")


def _expert_problems(model: Architecture, config: MegatronConfig, world_size: int) -> Iterator[Problem]:
    assert model.experts is not None
    if config.moe_token_dispatcher_type == "allgather" and config.expert_model_parallel_size > 1:
        yield Problem(
            _DISPATCHER,
            f"allgather with {_EXPERT} {config.expert_model_parallel_size} needs the same number of tokens on every "
            "rank, but samples differ in length; set it to alltoall",
        )
    expert, expert_tensor = config.expert_model_parallel_size, config.expert_tensor_size
    if config.moe_token_dispatcher_type == "flex" and expert * expert_tensor == 1:
        yield Problem(_DISPATCHER, f"flex with {_EXPERT} 1 sends no token to another rank; set it to alltoall")
    reducing = world_size // (config.tensor_model_parallel_size * config.pipeline_model_parallel_size)
    if config.overlap_grad_reduce and not config.moe_grouped_gemm and reducing > 1:
        yield Problem(
            "overlap_grad_reduce",
            f"true on {reducing} ranks with {model.experts.num_experts} ungrouped experts: ranks wait for each "
            f"other if an expert gets no token on one of them; set it to false, or {_GROUPED}: true",
            (_GROUPED,),
        )
    number, size = model.experts.num_experts, model.experts.intermediate_size
    rest = expert_tensor * config.pipeline_model_parallel_size
    if number % expert:
        choice = set_key(_EXPERT, expert, lambda n: number % n == 0 and world_size % (n * rest) == 0)
        yield Problem(_EXPERT, f"{expert} does not divide {number} experts; {choice}")
    if size % expert_tensor:
        others = expert * config.pipeline_model_parallel_size
        choice = set_key(_EXPERT_TENSOR, expert_tensor, lambda n: size % n == 0 and world_size % (n * others) == 0)
        yield Problem(
            _EXPERT_TENSOR, f"{expert_tensor} does not divide the {size} columns of moe_intermediate_size; {choice}"
        )
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        yield Problem(
            "sequence_parallel",
            f"false with {_TENSOR} {config.tensor_model_parallel_size}: megatron does not train mixtures of experts "
            "this way; set it to true",
        )


def _dense_problems(config: MegatronConfig) -> Iterator[Problem]:
    """Yield keys of experts that are set for a dense model."""
    keys = {
        _EXPERT: (config.expert_model_parallel_size, 1),
        _EXPERT_TENSOR: (config.expert_tensor_parallel_size, None),
        _DISPATCHER: (config.moe_token_dispatcher_type, "alltoall"),
        _GROUPED: (config.moe_grouped_gemm, False),
        "moe_permute_fusion": (config.moe_permute_fusion, False),
        "moe_router_fusion": (config.moe_router_fusion, False),
    }
    for key, (value, off) in keys.items():
        if value != off:
            default = {None: "null", False: "false"}.get(off, off)
            yield Problem(key, f"{str(value).lower()} is about experts, and the model has none; set it to {default}")


@dataclass(frozen=True)
class RankParameters:
    """The parameters that one rank holds: those of experts, and all others."""

    shared: int
    experts: int

    @property
    def total(self) -> int:
        """Parameters of both kinds."""
        return self.shared + self.experts


def parameters_of_rank(
    model: Architecture, config: MegatronConfig, stage: int, head: Literal["vocabulary", "value"] = "vocabulary"
) -> RankParameters:
    """Count the parameters of a rank of a pipeline stage; all ranks of a stage have equally many.

    The vocabulary is padded to a multiple of the tensor-parallel size. Every rank has norms and routers. The first and
    the last stage have a tied embedding.

    Args:
        model: the whole model.
        config: its layout.
        stage: number of the stage, from 0.
        head: output layer of the last stage; a value head is [1, H] on every rank.
    """
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    hidden, head_dim, layers = model.hidden_size, model.head_dim, model.num_layers // pipeline
    projected = model.num_attention_heads + 2 * model.num_key_value_heads  # heads of query, key and value
    layer = hidden * head_dim * (projected + model.num_attention_heads) // tensor
    layer += hidden * (model.family.norms.num_before + model.family.norms.num_after)
    layer += head_dim * projected // tensor if model.qkv_bias else 0
    layer += sum(model.qk_norm_sizes)
    experts = 0
    if model.experts is None:
        layer += 3 * hidden * model.intermediate_size // tensor
    else:
        layer += hidden * model.experts.num_experts  # the router
        share = config.expert_model_parallel_size * config.expert_tensor_size
        experts = layers * 3 * hidden * model.experts.intermediate_size * model.experts.num_experts // share
    shared = layers * layer
    embedding = -(-model.vocab_size // tensor) * hidden
    is_first, is_last = stage == 0, stage == pipeline - 1
    shared += embedding if is_first else 0
    if is_last:
        shared += hidden  # the final norm
        if head == "value":
            shared += hidden
        elif not (model.tie_word_embeddings and is_first):
            shared += embedding
    return RankParameters(shared, experts)


def optimizer_shares(config: MegatronConfig, world_size: int) -> tuple[int, int]:
    """Return how many ranks share the optimizer state of (other parameters, experts): 1 unless it is distributed."""
    if not config.use_distributed_optimizer:
        return 1, 1
    stage = world_size // config.pipeline_model_parallel_size
    experts = config.expert_tensor_size * config.expert_model_parallel_size
    return max(stage // config.tensor_model_parallel_size, 1), max(stage // experts, 1)
