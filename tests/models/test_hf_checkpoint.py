from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build_model, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from roll_gspo.errors import CheckpointError
from roll_gspo.models.architecture import Architecture
from roll_gspo.models.checkpoint_shapes import checkpoint_shapes
from roll_gspo.models.hf_checkpoint import CheckpointReader, Fingerprint, verify_weights, write_checkpoint


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
        assert all(torch.equal(reader.read(n, 0, 3, 8), t[3:8]) for n, t in want.items() if "_proj" in n)
        assert all(torch.equal(reader.read(n, 1, 5, 20), t[:, 5:20]) for n, t in want.items() if "_proj" in n)
        assert all(reader.shape(name) == tensor.shape for name, tensor in want.items())
        reader.check(checkpoint_shapes(Architecture.from_checkpoint(per_expert)))
        with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.0\.mlp\.experts\.4\.up_proj\.weight'"):
            reader.shape("model.layers.0.mlp.experts.4.up_proj.weight")


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
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in weights.items())
    assert reader.names == weights.keys()
    reloaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in weights.items())


def test_export_keeps_chat_templates_and_drops_descriptions_of_the_source_weights(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "llama")
    weights = load_file(source / "model.safetensors")
    listed = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": listed}))
    stale = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors.index.fp32.json")
    for name in (*stale, "adapter_config.json"):
        (source / name).write_text('{"weight_map": {}}')
    exported = []
    for number, files in enumerate(({}, {"chat_template.jinja": "c", "additional_chat_templates/rag.jinja": "d"})):
        for name, text in files.items():
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_text(text)
        (target := tmp_path / str(number)).mkdir()
        write_checkpoint(target, source, weights.items(), torch.float32)
        exported.append(AutoTokenizer.from_pretrained(target).chat_template)
        assert exported[-1] == AutoTokenizer.from_pretrained(source).chat_template
        assert not [*target.glob("*.index*.json"), *target.glob("adapter*")]
    assert exported == [{"default": "a", "tool_use": "b"}, {"default": "c", "rag": "d"}]


def test_single_file_has_precedence_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "model-00001-of-00002.safetensors"}}')
    assert CheckpointReader(tmp_path).names == {"a"}


def test_config_has_the_written_dtype(tmp_path: Path) -> None:
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


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    file = write_model(tmp_path, "llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_that_transformers_writes(tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path, family)
    found = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert checkpoint_shapes(Architecture.from_checkpoint(folder)) == found


def test_changed_weights_on_disk_are_detected(tmp_path: Path) -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    written = {name: Fingerprint.of(tensor) for name, tensor in weights.items()}
    changes = {
        "a": {**weights, "a": weights["a"].flip(0)},
        "b": {**weights, "b": torch.ones(4, dtype=torch.float16)},
        "c": {**weights, "c": torch.ones(1)},
    }
    save_file(weights, tmp_path / "model.safetensors")
    verify_weights(tmp_path, written)
    for name, changed in changes.items():
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"1 tensors .*'{name}'"):
            verify_weights(tmp_path, written)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Limit the size of every file, which fails like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_no_files(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "qwen3_untied")
    weights = load_file(source / "model.safetensors")
    (tmp_path / "target").mkdir()
    with file_size_limit(150_000), pytest.raises(CheckpointError, match="target: the model cannot be written"):
        write_checkpoint(tmp_path / "target", source, weights.items(), torch.float32)
    assert not list((tmp_path / "target").iterdir())
