"""The plan's count of parameters is that of the model which megatron builds, for every rank of the shipped layouts."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from composed import load_config
from planned_cases import Built, build_all

from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.megatron.args import MegatronInferArgs, MegatronTrainArgs
from roll_gspo.strategies.megatron.config import MegatronConfig
from roll_gspo.strategies.megatron.layout import layout_problems, optimizer_shares, parameters_of_rank

pytestmark = pytest.mark.megatron

_CONSTANTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e6}
QWEN3_30B = _CONSTANTS | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
}
QWEN25_7B = _CONSTANTS | {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
TIED = QWEN25_7B | {"model_type": "qwen3", "num_hidden_layers": 8, "vocab_size": 1001, "tie_word_embeddings": True}
SMALL = TIED | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8}
SMALL_EXPERTS = SMALL | {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
SMALL_EXPERTS |= {"moe_intermediate_size": 128, "norm_topk_prob": True}
SMALL_MOE = QWEN3_30B | {"num_hidden_layers": 4, "num_experts": 8, "vocab_size": 1001}


def _shipped(example: str, role: str) -> tuple[MegatronConfig, int]:
    """Layout and number of ranks of a role; megatron's grouped product, whose weights are the same, needs a GPU."""
    config = load_config(example).config
    block = {"actor_train": config.actor_train, "reference": config.reference}[role]
    assert block is not None and block.device_mapping is not None
    assert isinstance(block.strategy_args, MegatronTrainArgs | MegatronInferArgs)
    layout = block.strategy_args.strategy_config.model_copy(update={"moe_grouped_gemm": False})
    return layout, len(block.device_mapping)


def _own(**sizes: Any) -> MegatronConfig:
    return MegatronConfig(**sizes, use_distributed_optimizer=True)


CASES: dict[str, tuple[dict[str, Any], MegatronConfig, int]] = {
    "30b": (QWEN3_30B, *_shipped("qwen3_30b_a3b_gspo", "actor_train")),
    "30b reference": (QWEN3_30B, *_shipped("qwen3_30b_a3b_gspo", "reference")),
    "7b": (QWEN25_7B, *_shipped("qwen2.5_7b_gspo", "actor_train")),
    "tied": (TIED, _own(tensor_model_parallel_size=2), 4),
    "tied stages": (
        TIED,
        _own(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        4,
    ),
    "contexts": (TIED, _own(context_parallel_size=2, tensor_model_parallel_size=2), 8),
    "small": (SMALL, _own(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 8),
    "small, whole optimizer": (SMALL, MegatronConfig(tensor_model_parallel_size=2), 4),
    "small experts": (
        SMALL_EXPERTS,
        _own(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            expert_model_parallel_size=4,
            expert_tensor_parallel_size=1,
        ),
        8,
    ),
    "cut experts": (
        SMALL_MOE,
        _own(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=4),
        8,
    ),
}


ALLOCATED = ("small", "small experts", "small, whole optimizer")


@pytest.fixture(scope="module")
def built() -> dict[str, list[Built]]:
    """Build the models with megatron in a separate process, since their groups conflict with those of other tests."""
    jobs = [
        (Architecture.from_config(model), layout, world_size, name in ALLOCATED)
        for name, (model, layout, world_size) in CASES.items()
    ]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(CASES, pool.submit(build_all, jobs).result(timeout=240), strict=True))


@pytest.mark.parametrize("name", list(CASES))
def test_planned_parameters_are_those_of_every_rank(name: str, built: dict[str, list[Built]]) -> None:
    values, layout, world_size = CASES[name]
    model = Architecture.from_config(values)
    assert not list(layout_problems(model, layout, world_size, on_cuda=None))
    assert len(built[name]) == world_size
    for rank, (shared, experts, shares, stage, _) in enumerate(built[name]):
        assert stage == rank // (world_size // layout.pipeline_model_parallel_size)
        planned = parameters_of_rank(model, layout, stage)
        assert (shared, experts) == (planned.shared, planned.experts), rank
        if layout.use_distributed_optimizer:
            assert shares == optimizer_shares(layout, world_size)


@pytest.mark.parametrize("name", ALLOCATED)
def test_planned_bytes_are_those_that_megatron_allocates(name: str, built: dict[str, list[Built]]) -> None:
    values, layout, world_size = CASES[name]
    model = Architecture.from_config(values)
    shared, experts = optimizer_shares(layout, world_size)
    for built_rank in built[name]:
        rank = parameters_of_rank(model, layout, built_rank.stage)
        planned = (2 * rank.total, 4 * rank.total, 12 * (rank.shared / shared + rank.experts / experts))
        assert built_rank.allocated is not None
        # Buffers are padded, and ranks share the optimizer by bucket.
        assert built_rank.allocated == pytest.approx(planned, rel=0.01)


def test_shipped_layout_of_the_large_mixture_is_the_one_that_was_meant() -> None:
    layout, world_size = CASES["30b"][1:]
    sizes = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.expert_model_parallel_size)
    assert (*sizes, layout.expert_tensor_parallel_size, world_size) == (4, 2, 8, 1, 16)
    assert world_size // layout.model_parallel_size == 2
