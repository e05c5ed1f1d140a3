"""Every parameter of TransformerEngine's layers has a recipe: checkpoint -> layers -> checkpoint, the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_device import te_cases
from ranks import Ranks
from tiny_models import write_model

pytestmark = pytest.mark.megatron


@pytest.fixture
def process() -> Iterator[Ranks]:
    """A process that imports megatron with stubs of TransformerEngine."""
    pool = Ranks()
    yield pool
    pool.close()


def test_parameters_of_transformer_engine_are_loaded_and_exported(process: Ranks, tmp_path: Path) -> None:
    folders = {family: write_model(tmp_path / family, family) for family in ("qwen2", "qwen3_untied", "qwen3_moe")}
    models = [(folder, False) for folder in folders.values()] + [(folders["qwen3_moe"], True)]
    (names,) = process.run(1, te_cases.exported, models)
    with_bias, with_norms, experts, grouped = (" ".join(found) for found in names)
    layer = "decoder.layers.0."
    assert f"{layer}self_attention.linear_qkv.layer_norm_weight" in with_bias
    assert f"{layer}self_attention.linear_qkv.bias" in with_bias and f"{layer}mlp.linear_fc1.layer_norm" in with_bias
    assert f"{layer}self_attention.q_layernorm.weight" in with_norms
    assert f"{layer}mlp.experts.local_experts.3.linear_fc2.weight" in experts
    assert f"{layer}mlp.experts.linear_fc1.weight3" in grouped and f"{layer}pre_mlp_layernorm.weight" in grouped
