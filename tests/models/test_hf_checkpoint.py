from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_model, write_model
from transformers import AutoModelForCausalLM

from roll_gspo.errors import CheckpointError
from roll_gspo.models.hf_checkpoint import CheckpointReader, write_checkpoint


def test_reader_finds_experts_in_the_fused_layout(tmp_path: Path) -> None:
    per_expert = write_model(tmp_path / "source", "qwen3_moe")
    (tmp_path / "fused").mkdir()
    fused = {name: tensor.detach().clone() for name, tensor in build_model("qwen3_moe").named_parameters()}
    save_file(fused, tmp_path / "fused" / "model.safetensors")
    want = load_file(per_expert / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in want and want.keys() != fused.keys()
    for folder in (per_expert, tmp_path / "fused"):
        reader = CheckpointReader(folder)
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in want.items())
        assert reader.unread == set()


def test_shards_are_written_indexed_and_read_back(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "qwen3_untied")
    weights = load_file(source / "model.safetensors")
    target = tmp_path / "target"
    target.mkdir()
    write_checkpoint(target, source, weights.items(), torch.float32, max_shard_bytes=100_000)
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 2 and not list(target.glob("*.part"))
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    reader = CheckpointReader(target)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in weights.items()) and not reader.unread
    reloaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in weights.items())


def test_config_says_the_dtype_that_was_written(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "llama")
    target = tmp_path / "target"
    target.mkdir()
    write_checkpoint(target, source, load_file(source / "model.safetensors").items(), torch.bfloat16)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        CheckpointReader(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        CheckpointReader(tmp_path).read("b")
