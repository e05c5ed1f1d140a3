"""Checks of layouts against model, ranks and machine; errors name the numbers and the fix."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import DEEPER, FAMILIES

from roll_gspo.config.strategy import MegatronConfig, VllmConfig
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.layout import engine_problems, layout_problems, optimizer_shares, parameters_of_rank
from roll_gspo.models.size import architecture_of, size_of
from roll_gspo.models.tiny import TINY_MODELS

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
SP, DISPATCHER = "sequence_parallel", "moe_token_dispatcher_type"
# 12 layers, 12 heads, 6 key/value heads, 96 columns; 12 experts of 32 columns
DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 12,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def problems(model: dict[str, Any], layout: dict[str, Any], ranks: int, on_cuda: bool | None = False) -> list[str]:
    """Return the problems of a layout that `MegatronConfig` accepts."""
    return layout_problems(Architecture.from_config(model), MegatronConfig(**layout), ranks, on_cuda)


@pytest.mark.parametrize(
    ("model", "layout", "ranks"),
    [
        *((DENSE, {}, 1), (DENSE, {}, 7), (DENSE, {TP: 6, SP: True}, 6), (DENSE, {TP: 3, PP: 4, CP: 2}, 48)),
        *((DENSE, {PP: 3, VPP: 4}, 3), (MOE, {EP: 4}, 8), (MOE, {TP: 2, SP: True}, 2), (MOE, {EP: 12}, 12)),
        *((MOE, {TP: 2, SP: True, EP: 2, ETP: 1}, 2), (MOE, {PP: 2, EP: 2}, 4)),
        (MOE, {TP: 2, SP: True, DISPATCHER: "allgather"}, 2),
    ],
)
def test_valid_layouts_are_accepted(model: dict[str, Any], layout: dict[str, Any], ranks: int) -> None:
    assert problems(model, layout, ranks) == []


@pytest.mark.parametrize(
    ("model", "layout", "ranks", "texts"),
    [
        (DENSE, {TP: 4}, 4, (f"{TP} 4 does not divide 6 key/value heads; set {TP} to 2",)),
        (DENSE, {TP: 4}, 12, (f"set {TP} to 3 or 6",)),
        (DENSE, {TP: 5}, 30, ("5 does not divide 12 attention heads and 6 key/value heads and 96 columns", "3 or 6")),
        (DENSE, {TP: 2}, 3, (f"{TP} 2 * {PP} 1 * {CP} 1 = 2", "3 rank(s)", "device_mapping to 2 or 4 devices")),
        (DENSE, {TP: 2}, 1, (f"1 rank(s) are no multiple; set device_mapping to 2 devices, or {TP} to 1",)),
        (DENSE, {TP: 3, PP: 2}, 4, ("= 6 ranks hold one copy of the model, of which 4 rank(s)", f"{TP} to 2")),
        (DENSE, {PP: 5}, 60, (f"{PP} 5 does not divide 12 layers; set {PP} to 4 or 6",)),
        (DENSE, {PP: 2, VPP: 4}, 2, (f"{VPP} 4 * {PP} 2 = 8 does not divide 12 layers; set {VPP} to 3 or 6",)),
        (DENSE, {EP: 2}, 2, (f"{EP}: 2 is about experts, and the model has none; set it to 1",)),
        (DENSE, {TP: 2, ETP: 2}, 2, (f"{ETP}: 2 is about experts", "set it to null")),
        (DENSE, {DISPATCHER: "allgather"}, 1, (f"{DISPATCHER}: allgather is about experts", "set it to alltoall")),
        (MOE, {EP: 5}, 60, (f"{EP} 5 does not divide 12 experts; set {EP} to 4 or 6",)),
        (MOE, {EP: 8}, 8, (f"{EP} 8 does not divide 12 experts; set {EP} to 4",)),
        (MOE, {EP: 4}, 6, (f"{EP} 4 * {ETP} 1 * {PP} 1 = 4 ranks hold one copy of the experts", f"{EP} to 3 or 6")),
        (
            MOE,
            {TP: 3, SP: True},
            3,
            (f"{ETP} 3 does not divide the 32 columns of moe_intermediate_size; set {ETP} to 1",),
        ),
        (MOE, {TP: 2}, 2, (f"sequence_parallel: false with {TP} 2", "set it to true")),
        (
            MOE,
            {TP: 2, SP: True, EP: 2},
            4,
            (f"{DISPATCHER}: alltoall with {EP} 2 and {ETP} 2", "gloo", f"set {ETP}: 1"),
        ),
        (MOE, {EP: 2, DISPATCHER: "allgather"}, 2, (f"{DISPATCHER}: allgather with {EP} 2", "set it to alltoall")),
        (MOE, {"moe_grouped_gemm": True}, 1, ("moe_grouped_gemm: needs CUDA and TransformerEngine",)),
    ],
)
def test_invalid_layouts_are_rejected_with_the_nearest_choice(
    model: dict[str, Any], layout: dict[str, Any], ranks: int, texts: tuple[str, ...]
) -> None:
    (problem,) = problems(model, layout, ranks)
    for text in texts:
        assert text in problem


def test_suggested_sizes_fit() -> None:
    for size in (2,):
        assert problems(DENSE, {TP: size}, 4) == []
    for size in (3, 6):
        assert problems(DENSE, {TP: size}, 12) == problems(DENSE, {PP: 2, VPP: size}, 2) == []
        assert problems(MOE, {EP: size}, 6) == []
    for size in (4, 6):
        assert problems(DENSE, {PP: size}, 60) == problems(MOE, {EP: size}, 60) == []


def test_layouts_that_need_nccl_are_rejected_on_a_cpu() -> None:
    layout = {TP: 2, SP: True, EP: 2, "moe_grouped_gemm": True}
    assert len(problems(MOE, layout, 4, on_cuda=False)) == 2
    assert problems(MOE, layout, 4, on_cuda=True) == problems(MOE, layout, 4, on_cuda=None) == []


def test_error_suggests_unsplit_experts() -> None:
    (problem,) = problems(MOE, {TP: 2, SP: True, EP: 2}, 2, on_cuda=None)
    assert problem.startswith(f"{EP} 2 * {ETP} 2 * {PP} 1 = 4 ranks") and f"set {ETP}: 1, or {EP} to 1" in problem
    assert problems(MOE, {TP: 2, SP: True, EP: 2, ETP: 1}, 2, on_cuda=None) == []


def test_unknown_model_is_checked_against_its_ranks_only() -> None:
    assert layout_problems(None, MegatronConfig(tensor_model_parallel_size=5), 10, False) == []
    (problem,) = layout_problems(None, MegatronConfig(tensor_model_parallel_size=5), 8, False)
    assert "8 rank(s)" in problem


@pytest.mark.parametrize(("size", "text"), [(1, ""), (2, ""), (12, ""), (5, "to 4"), (8, "to 4 or 12")])
def test_engine_sizes_must_divide_heads(size: int, text: str) -> None:
    """vLLM replicates key/value heads if there are fewer than devices."""
    model = Architecture.from_config(DENSE | {"num_key_value_heads": 4})
    found = engine_problems(model, VllmConfig(tensor_parallel_size=size))
    assert all(text in problem and f"tensor_parallel_size {size} does not fit" in problem for problem in found)
    assert len(found) == (1 if text else 0)


@pytest.mark.parametrize("family", sorted(FAMILIES | DEEPER))
def test_single_rank_holds_all_parameters(family: str) -> None:
    model_class, config = (FAMILIES | DEEPER)[family]
    architecture = Architecture.from_config(config.to_dict())
    number = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert parameters_of_rank(architecture, MegatronConfig(), 0).total == number


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_parameters_of_builtin_models_equal_their_size(name: str) -> None:
    model, size = architecture_of(f"builtin:{name}"), size_of(f"builtin:{name}")
    assert model is not None and size is not None
    alone = parameters_of_rank(model, MegatronConfig(), 0)
    assert (alone.total, alone.experts) == (size.num_parameters, size.num_expert_parameters)


def test_critic_has_a_value_head_instead_of_the_vocabulary() -> None:
    model, layout = Architecture.from_config(DENSE), MegatronConfig(pipeline_model_parallel_size=2)
    policy, critic = (parameters_of_rank(model, layout, 1, head) for head in ("vocabulary", "value"))
    assert policy.total - critic.total == 101 * 64 - 64
    assert parameters_of_rank(model, layout, 0) == parameters_of_rank(model, layout, 0, "value")


def test_optimizer_state_is_unsharded_without_the_distributed_optimizer() -> None:
    assert optimizer_shares(MegatronConfig(tensor_model_parallel_size=2), 8) == (1, 1)
    shared = MegatronConfig(tensor_model_parallel_size=2, context_parallel_size=2, use_distributed_optimizer=True)
    assert optimizer_shares(shared, 8) == (4, 4), "context ranks hold the same parameters"
