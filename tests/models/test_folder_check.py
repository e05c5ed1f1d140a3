"""Model folders that are whole, and facts that are read without the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build_model, write_model

from roll_gspo.errors import ConfigError
from roll_gspo.models.folder_check import check_folder
from roll_gspo.models.hf_checkpoint import write_checkpoint
from roll_gspo.models.size import context_length_of, head_size_of, size_of
from roll_gspo.strategies.hf.model import load_model


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_folders_pass_in_one_file_and_in_shards(tmp_path: Path, family: str) -> None:
    source = write_model(tmp_path / "source", family)
    check_folder(source, needs_safetensors=True)
    (tmp_path / "shards").mkdir()
    weights = load_file(source / "model.safetensors")
    write_checkpoint(tmp_path / "shards", source, weights.items(), torch.bfloat16, max_shard_bytes=50_000)
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    check_folder(tmp_path / "shards", needs_safetensors=True)


def test_pickled_weights_pass_for_engines_that_read_them(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(build_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    check_folder(tmp_path, needs_safetensors=False)
    with pytest.raises(ConfigError, match=r"convert pytorch_model\.bin to safetensors"):
        check_folder(tmp_path, needs_safetensors=True)


def test_missing_tensors_are_not_replaced_by_random_ones(tmp_path: Path) -> None:
    file = write_model(tmp_path, "llama") / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"2 tensors of the model are not in the weights, e\.g\. 'lm_head\.weight'"):
        load_model(tmp_path, torch.float32, "sdpa")


def test_families_with_other_keys_have_no_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8, "n_head": 2}))
    assert (size_of(str(tmp_path)), context_length_of(str(tmp_path)), head_size_of(str(tmp_path))) == (None,) * 3
