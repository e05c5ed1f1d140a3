"""Layouts that fit a model, its ranks and its machine; other layouts are refused with the nearest valid size."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from tiny_models import DEEPER, FAMILIES

from roll_gspo.config.base import Problem
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.size import architecture_of, size_of
from roll_gspo.models.tiny import TINY_MODELS
from roll_gspo.strategies.megatron.args import MegatronTrainArgs
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.layout import (
    layout_problems,
    optimizer_shares,
    parameters_of_rank,
    transformer_engine_problems,
)

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


def problems(model: dict[str, Any], layout: dict[str, Any], ranks: int, on_cuda: bool | None = False) -> list[Problem]:
    """Problems of a layout that `MegatronConfig` accepts."""
    return list(layout_problems(Architecture.from_config(model), MegatronConfig(**layout), ranks, on_cuda))


@pytest.mark.parametrize(
    ("model", "layout", "ranks"),
    [
        *((DENSE, {}, 1), (DENSE, {}, 7), (DENSE, {TP: 6, SP: True}, 6), (DENSE, {TP: 3, PP: 4, CP: 2}, 48)),
        *((DENSE, {PP: 3, VPP: 4}, 3), (MOE, {EP: 4}, 8), (MOE, {TP: 2, SP: True}, 2), (MOE, {EP: 12}, 12)),
        *((MOE, {TP: 2, SP: True, EP: 2, ETP: 1}, 2), (MOE, {PP: 2, EP: 2}, 4)),
        (MOE, {TP: 2, SP: True, DISPATCHER: "allgather"}, 2),
    ],
)
def test_valid_layout_has_no_problem(model: dict[str, Any], layout: dict[str, Any], ranks: int) -> None:
    assert problems(model, layout, ranks) == []


@pytest.mark.parametrize(
    ("model", "layout", "ranks", "key", "values"),
    [
        (DENSE, {TP: 4}, 4, TP, ("4", "6 key/value heads", f"{TP} to 2")),
        (DENSE, {TP: 4}, 12, TP, ("4", f"{TP} to 3 or 6")),
        (DENSE, {TP: 5}, 30, TP, ("12 attention heads", "6 key/value heads", "96 columns", "3 or 6")),
        (DENSE, {TP: 2}, 3, TP, ("2", f"{PP} 1", f"{CP} 1", "= 2", "3 rank", "2 or 4 devices")),
        (DENSE, {TP: 2}, 1, TP, ("1 rank", "device_mapping to 2", "to 1")),
        (DENSE, {TP: 3, PP: 2}, 4, TP, ("= 6", "4 rank", "to 2")),
        (DENSE, {PP: 5}, 60, PP, ("5", "12 layers", f"{PP} to 4 or 6")),
        (DENSE, {PP: 2, VPP: 4}, 2, VPP, ("4", f"{PP} 2", "= 8", "12 layers", f"{VPP} to 3 or 6")),
        (DENSE, {EP: 2}, 2, EP, ("2", "to 1")),
        (DENSE, {TP: 2, ETP: 2}, 2, ETP, ("2", "to null")),
        (DENSE, {DISPATCHER: "allgather"}, 1, DISPATCHER, ("allgather", "to alltoall")),
        (MOE, {EP: 5}, 60, EP, ("5", "12 experts", f"{EP} to 4 or 6")),
        (
            MOE,
            {"overlap_grad_reduce": True},
            2,
            "overlap_grad_reduce",
            ("12 ungrouped experts", "moe_grouped_gemm: true"),
        ),
        (MOE, {EP: 8}, 8, EP, ("8", "12 experts", f"{EP} to 4")),
        (MOE, {EP: 4}, 6, EP, ("4", f"{ETP} 1", f"{PP} 1", "= 4", "6 rank", "to 3 or 6")),
        (MOE, {TP: 3, SP: True}, 3, ETP, ("3", "32 columns", f"{ETP} to 1")),
        (MOE, {TP: 2}, 2, SP, ("false", f"{TP} 2", "to true")),
        (MOE, {TP: 2, SP: True, EP: 2}, 4, DISPATCHER, ("alltoall", f"{EP} 2", f"{ETP} 2", "gloo", f"{ETP}: 1")),
        (MOE, {EP: 2, DISPATCHER: "allgather"}, 2, DISPATCHER, ("allgather", f"{EP} 2", "to alltoall")),
        (MOE, {"moe_grouped_gemm": True}, 1, "moe_grouped_gemm", ("true", "CUDA", "to false")),
    ],
)
def test_invalid_layout_is_refused_with_the_nearest_valid_one(
    model: dict[str, Any], layout: dict[str, Any], ranks: int, key: str, values: tuple[str, ...]
) -> None:
    (problem,) = problems(model, layout, ranks)
    assert problem.key == key
    assert all(value in problem.message for value in values)


def test_suggested_sizes_fit() -> None:
    for size in (2,):
        assert problems(DENSE, {TP: size}, 4) == []
    for size in (3, 6):
        assert problems(DENSE, {TP: size}, 12) == problems(DENSE, {PP: 2, VPP: size}, 2) == []
        assert problems(MOE, {EP: size}, 6) == []
    for size in (4, 6):
        assert problems(DENSE, {PP: size}, 60) == problems(MOE, {EP: size}, 60) == []


def test_limits_of_gloo_apply_without_cuda_only() -> None:
    layout = {TP: 2, SP: True, EP: 2, "moe_grouped_gemm": True}
    assert len(problems(MOE, layout, 4, on_cuda=False)) == 2
    assert problems(MOE, layout, 4, on_cuda=True) == problems(MOE, layout, 4, on_cuda=None) == []


@pytest.mark.parametrize(
    ("key", "value", "texts"),
    [
        ("moe_permute_fusion", True, ("CUDA and TransformerEngine", "set it to false")),
        ("moe_router_fusion", True, ("CUDA and TransformerEngine", "set it to false")),
        ("apply_rope_fusion", True, ("CUDA and TransformerEngine", "set it to null")),
        ("gradient_accumulation_fusion", True, ("CUDA and apex", "set it to null")),
        ("moe_token_dispatcher_type", "flex", ("CUDA and DeepEP", "set it to alltoall")),
    ],
)
def test_kernels_of_gpus_are_refused_without_cuda(key: str, value: Any, texts: tuple[str, ...]) -> None:
    (problem,) = problems(MOE, {EP: 2, ETP: 1, key: value}, 2, on_cuda=False)
    assert problem.key == key and all(text in problem.message for text in texts)
    assert problems(MOE, {EP: 2, ETP: 1, key: value}, 2, on_cuda=True) == []


def test_flex_needs_ranks_that_share_experts() -> None:
    (problem,) = problems(MOE, {"moe_token_dispatcher_type": "flex"}, 2, on_cuda=True)
    assert problem.key == "moe_token_dispatcher_type" and "no token" in problem.message


@pytest.mark.parametrize("key", ["moe_permute_fusion", "moe_router_fusion"])
def test_kernels_of_experts_need_experts(key: str) -> None:
    (problem,) = problems(DENSE, {key: True}, 1, on_cuda=True)
    assert problem.key == key and "set it to false" in problem.message


@pytest.mark.parametrize("key", ["moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion", "apply_rope_fusion"])
def test_settings_of_transformer_engine_are_found_one_by_one(key: str) -> None:
    (problem,) = transformer_engine_problems(MegatronConfig(**{key: True}))
    assert problem.key == key and "not installed" in problem.message


def test_settings_of_transformer_engine_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    args = MegatronTrainArgs(strategy_name="megatron_train", strategy_config={"moe_grouped_gemm": True})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = args.missing_packages()
    assert problem.key == "strategy_config.moe_grouped_gemm"
    assert all(text in problem.message for text in ("not installed", "'roll-gspo[te]'", "set it to false"))
    assert not list(MegatronTrainArgs(strategy_name="megatron_train").missing_packages())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert not list(args.missing_packages())


@pytest.mark.parametrize(
    ("layout", "environment"),
    [
        ({}, {}),
        ({PP: 2, "use_distributed_optimizer": True}, {}),
        ({TP: 2, SP: True}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        ({"context_parallel_size": 2}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    ],
)
def test_ranks_that_share_a_layer_need_one_queue(layout: dict[str, Any], environment: dict[str, str]) -> None:
    args = MegatronTrainArgs(strategy_name="megatron_train", strategy_config=layout)
    assert args.gpu_environment == environment


def test_experts_on_too_few_ranks_may_be_left_unsplit() -> None:
    (problem,) = problems(MOE, {TP: 2, SP: True, EP: 2}, 2, on_cuda=None)
    assert problem.key == EP
    assert all(value in problem.message for value in (f"{ETP} 2", "= 4", f"{ETP}: 1", f"{EP} to 1"))
    assert problems(MOE, {TP: 2, SP: True, EP: 2, ETP: 1}, 2, on_cuda=None) == []


def test_layout_of_an_unknown_model_is_checked_against_its_ranks_only() -> None:
    assert not list(layout_problems(None, MegatronConfig(tensor_model_parallel_size=5), 10, False))
    (problem,) = layout_problems(None, MegatronConfig(tensor_model_parallel_size=5), 8, False)
    assert problem.key == TP and "8 rank" in problem.message


@pytest.mark.parametrize("family", sorted(FAMILIES | DEEPER))
def test_only_rank_holds_all_parameters(family: str) -> None:
    model_class, config = (FAMILIES | DEEPER)[family]
    architecture = Architecture.from_config(config.to_dict())
    number = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert parameters_of_rank(architecture, MegatronConfig(), 0).total == number


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_parameters_of_builtin_models_are_those_of_their_size(name: str) -> None:
    model, size = architecture_of(f"builtin:{name}"), size_of(f"builtin:{name}")
    assert model is not None and size is not None
    alone = parameters_of_rank(model, MegatronConfig(), 0)
    assert (alone.total, alone.experts) == (size.num_parameters, size.num_expert_parameters)


def test_critic_has_a_value_head_in_place_of_the_vocabulary() -> None:
    model, layout = Architecture.from_config(DENSE), MegatronConfig(pipeline_model_parallel_size=2)
    policy, critic = (parameters_of_rank(model, layout, 1, head) for head in ("vocabulary", "value"))
    assert policy.total - critic.total == 101 * 64 - 64
    assert parameters_of_rank(model, layout, 0) == parameters_of_rank(model, layout, 0, "value")


def test_optimizer_state_is_split_with_the_distributed_optimizer_only() -> None:
    assert optimizer_shares(MegatronConfig(tensor_model_parallel_size=2), 8) == (1, 1)
    shared = MegatronConfig(tensor_model_parallel_size=2, context_parallel_size=2, use_distributed_optimizer=True)
    assert optimizer_shares(shared, 8) == (4, 4), "context ranks hold the same parameters"
