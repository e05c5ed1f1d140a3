"""Every family that the FSDP2 engine packs has the scores of plain transformers, padded and packed, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import model_setup, optimizer_setup, policy_loss, sequences, train_batch
from safetensors.torch import load_file
from tiny_models import VOCAB, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from roll_gspo.strategies.fsdp2.config import PACKED_FAMILIES, Fsdp2Config
from roll_gspo.strategies.fsdp2.engine.infer import Fsdp2Infer
from roll_gspo.strategies.fsdp2.engine.train import Fsdp2Train
from roll_gspo.strategies.fsdp2.engine.weights import ShardedWeights
from roll_gspo.strategies.hf.config import HfConfig
from roll_gspo.strategies.hf.infer import HfInfer

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# A window shorter than the longest sample, if the family has one.
WINDOW = {"sliding_window": 6}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 4,
    },
    "cohere2": WINDOW,
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": WINDOW,
    "mixtral": {**WINDOW, "num_local_experts": 4},
    "olmo3": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "starcoder2": WINDOW,
}


def written(folder: Path, model_type: str) -> Path:
    """Write a random checkpoint of a family."""
    config = AutoConfig.for_model(model_type, **{**SHAPE, **OF_FAMILY.get(model_type, {})})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that attention matters
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", PACKED_FAMILIES)
def test_scores_and_weights_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    setup = model_setup(written(tmp_path, model_type))
    engines = [Fsdp2Infer(setup, Fsdp2Config(use_sequence_packing=packs)) for packs in (False, True)]
    padded, packed = (engine.score(sequences(), entropy=True) for engine in engines)
    assert padded.entropy is not None and packed.entropy is not None
    torch.testing.assert_close(packed.log_probs, padded.log_probs, rtol=0, atol=2e-5)
    torch.testing.assert_close(packed.entropy, padded.entropy, rtol=0, atol=2e-5)
    assert padded.log_probs[0].unique().numel() > 5
    plain = HfInfer(setup, HfConfig()).score(sequences(), entropy=True)
    torch.testing.assert_close(padded.log_probs, plain.log_probs, rtol=0, atol=2e-5)
    torch.testing.assert_close(padded.entropy, plain.entropy, rtol=0, atol=2e-5)
    model = engines[1]._model
    exported = dict(ShardedWeights(model.module, model.names, torch.float32))
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in exported.items()} == {n: t.shape for n, t in stored.items()}
    assert all(torch.equal(exported[name], tensor) for name, tensor in stored.items())


def test_padding_token_is_trained_where_it_is_text(tmp_path: Path) -> None:
    optimizer = optimizer_setup(weight_decay=0.0, warmup_steps=0)
    engine = Fsdp2Train(model_setup(write_model(tmp_path, "qwen3_untied")), optimizer, Fsdp2Config())
    batch = train_batch()
    batch.sequences.input_ids[0, 0] = 0  # the id of the padding token
    before = dict(engine.weights())["model.embed_tokens.weight"].clone()
    engine.update([batch], policy_loss, True)
    changed = (dict(engine.weights())["model.embed_tokens.weight"] != before).any(-1)
    assert changed[0] and not changed[2]
