"""Trainers of several ranks that move their state to the host between calls: the numbers are those without moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from state_cases import left, moved
from tiny_models import write_model

pytestmark = pytest.mark.megatron

LAYOUTS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "overlapped gradients": (
        "four_layers",
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
        torch.bfloat16,
    ),
    "virtual stages": (
        "four_layers",
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        torch.float32,
    ),
    "experts": (
        "four_layers_moe",
        {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
        torch.bfloat16,
    ),
    "FSDP2": ("qwen3_tied", {"engine": "fsdp2"}, torch.float32),
    "FSDP2 with gathered layers": ("qwen3_moe", {"engine": "fsdp2", "reshard_after_forward": False}, torch.bfloat16),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_continues_as_without_a_move(ranks: Ranks, tmp_path: Path, name: str) -> None:
    family, layout, dtype = LAYOUTS[name]
    for equal in ranks.run(2, moved, write_model(tmp_path, family), layout, dtype):
        assert equal == [True] * 5


@pytest.mark.parametrize("reshard", [pytest.param(True, marks=pytest.mark.long), False])
def test_gathered_parameters_of_fsdp2_leave_too(ranks: Ranks, tmp_path: Path, reshard: bool) -> None:
    layout = {"engine": "fsdp2", "reshard_after_forward": reshard}
    for found in ranks.run(2, left, write_model(tmp_path, "qwen3_untied"), layout):
        # positions of the last pass and other small tensors stay
        assert found["OFFLOADED"] < 0.05
        assert found["WEIGHTS"] == pytest.approx(1, rel=0.05)
        assert found["FULL"] == pytest.approx(3, rel=0.05)
