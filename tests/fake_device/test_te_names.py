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
    others = ("gemma3", "glm4", "phi3", "olmo2", "mixtral")
    families = ("qwen2", "qwen3_untied", "qwen3_moe", *others)
    folders = {family: write_model(tmp_path / family, family) for family in families}
    models = [(folders["qwen3_moe"], True)] + [(folder, False) for folder in folders.values()]
    (names,) = process.run(1, te_cases.exported, models)
    grouped, with_bias, with_norms, experts, gemma, _, _, olmo, _ = (" ".join(found) for found in names)
    layer = "decoder.layers.0."
    assert f"{layer}self_attention.linear_qkv.layer_norm_weight" in with_bias
    assert f"{layer}self_attention.linear_qkv.bias" in with_bias and f"{layer}mlp.linear_fc1.layer_norm" in with_bias
    assert f"{layer}self_attention.q_layernorm.weight" in with_norms
    assert f"{layer}mlp.experts.local_experts.3.linear_fc2.weight" in experts
    assert f"{layer}mlp.experts.linear_fc1.weight3" in grouped and f"{layer}pre_mlp_layernorm.weight" in grouped
    assert f"{layer}self_attention.linear_proj.post_layernorm.weight" in gemma
    assert f"{layer}self_attention.linear_qkv.layer_norm_weight" in gemma
    assert f"{layer}mlp.linear_fc2.post_layernorm.weight" in olmo and "layer_norm_weight" not in olmo
