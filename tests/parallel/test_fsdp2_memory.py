"""The memory estimate of the plan against torch's tracker: state of a rank, and what is gathered for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from tracked_memory import peaks
from transformers import Qwen3Config, Qwen3ForCausalLM

from roll_gspo.models.architecture import Architecture
from roll_gspo.strategies.fsdp2.config import Fsdp2Config
from roll_gspo.strategies.fsdp2.memory import gathered_bytes

DEEP = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 6}
WIDE_VOCABULARY = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        pytest.param(DEEP, torch.float32, {}, marks=pytest.mark.long),
        (DEEP, torch.bfloat16, {}),
        pytest.param(DEEP, torch.float32, {"reshard_after_forward": False}, marks=pytest.mark.long),
        (WIDE_VOCABULARY, torch.bfloat16, {}),
    ],
    ids=["deep", "deep in 16 bits", "kept", "wide vocabulary"],
)
def test_rank_needs_what_the_plan_estimates(
    tmp_path: Path, ranks: Ranks, shape: dict[str, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
    Qwen3ForCausalLM(Qwen3Config(**shape, **heads, tie_word_embeddings=True)).save_pretrained(tmp_path)
    model = Architecture.from_checkpoint(tmp_path)
    parameters = Qwen3ForCausalLM(Qwen3Config(**shape, **heads, tie_word_embeddings=True)).num_parameters()
    config = Fsdp2Config(**options)
    for found in ranks.run(2, peaks, tmp_path, dtype, options):
        # weights, gradients and two moments in float32; a tensor with an odd number of rows is not split evenly
        assert found["update"]["state"] == pytest.approx(16 * parameters / 2, rel=0.01)
        for work, train in (("update", True), ("score", False)):
            estimate = gathered_bytes(model, parameters, config, dtype.itemsize, train=train)
            # The tracker does not count gradients of the vocabulary before they are summed.
            assert 0.99 * found[work]["gathered"] <= estimate <= (1.35 if train else 1.01) * found[work]["gathered"]
