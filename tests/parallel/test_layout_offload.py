"""Trainers of several ranks that move their state to the host between calls: the numbers are those without moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import moved
from ranks import Ranks
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
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_continues_as_without_a_move(ranks: Ranks, tmp_path: Path, name: str) -> None:
    family, layout, dtype = LAYOUTS[name]
    for equal in ranks.run(2, moved, write_model(tmp_path, family), layout, dtype):
        assert equal == [True] * 5
