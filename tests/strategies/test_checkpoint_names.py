"""Checkpoint names of transformers models, checked against the files and against `from_pretrained`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from roll_gspo.errors import CheckpointError, ConfigError
from roll_gspo.models.hf_checkpoint import CheckpointReader
from roll_gspo.models.weight_mapping import fused_slice
from roll_gspo.strategies.checkpoint_names import CheckpointNames
from roll_gspo.strategies.hf.model import HfWeights
from scripts.model_families import FAMILIES

# Layouts that no family of the matrix has: stored tensors that make several parameters, and unequal parts.
OTHERS = {
    "hrm_text": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4},
    "gpt_neox": {},
}


def tiny(model_type: str, **settings: object) -> PreTrainedModel:
    """Build a model whose parameters and buffers are all random."""
    config = AutoConfig.for_model(model_type, **settings, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def on_meta(folder: Path) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def names_of(folder: Path) -> tuple[CheckpointNames, CheckpointReader]:
    reader = CheckpointReader(folder)
    return CheckpointNames(on_meta(folder), {name: reader.shape(name) for name in reader.names}), reader


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_files_and_parameters_convert_bit_for_bit_in_both_directions(family: str, tmp_path: Path) -> None:
    shape = FAMILIES["llama"].hf_config
    config = FAMILIES[family].hf_config if family in FAMILIES else {**shape, "model_type": family, **OTHERS[family]}
    tiny(**config).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    names, reader = names_of(tmp_path)
    for name, wanted in loaded.state_dict().items():
        joined = names.join(name, reader.read)
        assert joined.shape == wanted.shape and torch.equal(joined, wanted), name
        if wanted.dim():
            for start, stop in ((1, None), (1, 2), (1, 1)):
                rows = names.join(name, reader.read, start, stop)
                assert rows.shape == wanted[start:stop].shape and torch.equal(rows, wanted[start:stop]), name
    written = dict(HfWeights(loaded))
    stored = load_file(tmp_path / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in written.items())


def test_a_rank_reads_its_experts_only(tmp_path: Path) -> None:
    build_model("qwen3_moe").save_pretrained(tmp_path)
    names, reader = names_of(tmp_path)
    seen: list[str] = []

    def read(name: str, axis: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        seen.append(name)
        return reader.read(name, axis, start, stop)

    rows = names.join("model.layers.1.mlp.experts.gate_up_proj", read, 2, 3)
    assert torch.equal(rows, build_model("qwen3_moe").model.layers[1].mlp.experts.gate_up_proj[2:3])
    assert seen == [f"model.layers.1.mlp.experts.2.{kind}_proj.weight" for kind in ("gate", "up")]
    assert len(names.sources("model.layers.1.mlp.experts.gate_up_proj")) == 8


def test_split_gives_views_in_the_order_of_experts() -> None:
    fused = torch.randn(4, 6, 8)
    names = CheckpointNames(build_model("qwen3_moe"))
    parts = names.split("model.layers.0.mlp.experts.gate_up_proj", fused)
    assert [name for name, _ in parts[:3]] == [
        f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight"
        for expert, kind in ((0, "gate"), (0, "up"), (1, "gate"))
    ]
    assert all(part.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr() for _, part in parts)
    for name, part in parts:
        place = fused_slice(name)
        assert place is not None and torch.equal(place.select(fused[place.expert]), part)


def test_experts_stored_as_one_tensor_are_read(tmp_path: Path) -> None:
    model = build_model("qwen3_moe")
    model.config.save_pretrained(tmp_path)
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    names, reader = names_of(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    assert names.sources(name) == (name,)
    assert torch.equal(names.join(name, reader.read, 1, 3), model.state_dict()[name][1:3])
    assert names.split(name, model.state_dict()[name])[0][0] == "model.layers.0.mlp.experts.0.down_proj.weight"


def test_names_without_the_prefix_of_the_model_are_read(tmp_path: Path) -> None:
    model = build_model("qwen3_tied")
    model.config.save_pretrained(tmp_path)
    weights = {name.removeprefix("model."): tensor.clone() for name, tensor in model.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors")
    names, reader = names_of(tmp_path)
    assert names.sources("model.norm.weight") == ("norm.weight",)
    assert names.sources("lm_head.weight") == ("embed_tokens.weight",)  # tied
    assert torch.equal(names.join("model.norm.weight", reader.read), model.model.norm.weight)
    assert names.split("model.norm.weight", model.model.norm.weight)[0][0] == "model.norm.weight"


def test_prefix_of_a_text_model_inside_another_is_restored(tmp_path: Path) -> None:
    shape = FAMILIES["llama"].hf_config
    model = tiny(**{**shape, "model_type": "qwen3_5_text", "head_dim": 16})
    model.config.save_pretrained(tmp_path)
    weights = {
        name.replace("model.", "model.language_model.", 1): tensor.detach().clone()
        for name, tensor in model.named_parameters()
    }
    save_file(weights, tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert dict(HfWeights(loaded)).keys() == weights.keys()
    names, reader = names_of(tmp_path)
    assert names.split("model.norm.weight", model.model.norm.weight)[0][0] == "model.language_model.norm.weight"
    assert torch.equal(names.join("model.norm.weight", reader.read), model.model.norm.weight)


def test_wrong_and_missing_tensors_are_named(tmp_path: Path) -> None:
    model = build_model("llama")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\(7,\).*\(64,\)"):
        CheckpointNames(model, {**shapes, "model.norm.weight": (7,)})
    del shapes["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        CheckpointNames(model, shapes).sources("model.norm.weight")


def test_layouts_that_cannot_be_views_are_refused() -> None:
    model = tiny(**{**FAMILIES["llama"].hf_config, "model_type": "hrm_text"})
    with pytest.raises(ConfigError, match="hrm_text"):
        HfWeights(model).views()
    with pytest.raises(ConfigError, match="hrm_text"):
        CheckpointNames(model).split(*next((n, p) for n, p in model.named_parameters() if "gate_proj" in n))
