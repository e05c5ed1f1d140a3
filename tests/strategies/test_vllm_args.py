"""Tensor-parallel sizes that vLLM accepts for a model."""

from __future__ import annotations

import pytest
from tiny_models import FAMILIES

from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.vllm.args import tensor_parallel_problems

# 12 heads, 96 columns; vLLM repeats the 4 key/value heads on more devices
SIZES = {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 96, "head_dim": 16}


@pytest.mark.parametrize(("size", "nearest"), [(1, None), (2, None), (12, None), (5, "4"), (8, "4 or 12")])
def test_tensor_parallel_size_divides_heads(size: int, nearest: str | None) -> None:
    model = Architecture.from_config(FAMILIES["qwen3_tied"][1].to_dict() | SIZES)
    problems = list(tensor_parallel_problems(model, size))
    assert len(problems) == (nearest is not None)
    for problem in problems:
        assert problem.key == "strategy_config.tensor_parallel_size"
        assert problem.message.startswith(f"{size} ") and problem.message.endswith(f"to {nearest}")
