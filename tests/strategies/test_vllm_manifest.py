"""Expected tensors of a model, read from checkpoint headers, and differences from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.vllm.engine.manifest import (
    AdapterManifest,
    Arrived,
    differences,
    expected_shapes,
    linear_names,
)


def test_expected_shapes_reads_all_shards_of_the_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(4), "x.rotary_emb.inv_freq": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    save_file({"stray": torch.zeros(4)}, tmp_path / "other.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert expected_shapes(tmp_path, tied=False) == {"a": (2, 3), "b": (4,)}


def test_expected_shapes_leaves_a_tied_head_out(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "lm_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert expected_shapes(tmp_path, tied=True) == {"a": (2,)}
    assert set(expected_shapes(tmp_path, tied=False)) == {"a", "lm_head.weight"}


def test_expected_shapes_without_safetensors_says_so(tmp_path: Path) -> None:
    with pytest.raises(WeightTransferError, match=r"no model\.safetensors in .*; save the checkpoint"):
        expected_shapes(tmp_path, tied=False)


def test_differences_names_every_kind() -> None:
    expected = {f"w{i}": (i, 2) for i in range(12)}
    right = [(name, shape, torch.bfloat16) for name, shape in expected.items()]
    assert differences(expected, right) == []
    assert differences(expected, right[::-1]) == []
    assert differences(expected, right[1:]) == ["1 missing: w0"]
    assert differences(expected, []) == ["12 missing: w0, w1, w2, w3, w4, w5, w6, w7, and 4 more"]
    assert differences(expected, [*right, ("new", (1,), torch.float32)]) == ["1 unexpected: new"]
    assert differences(expected, [*right, right[3]]) == ["1 sent twice: w3"]
    assert differences({"a": (2, 3)}, [("a", (3, 2), torch.float32)]) == ["1 of another shape: a [3, 2], not [2, 3]"]
    assert differences({"a": (2,)}, [("a", (2,), torch.int64)]) == ["1 not floating point: a torch.int64"]


def test_linear_names_are_those_inside_layers() -> None:
    shapes = {
        "model.embed_tokens.weight": (64, 8),
        "lm_head.weight": (64, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.1.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.q_proj.bias": (8,),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.0.mlp.gate_up_proj.weight": (16, 8),
        "model.layers.0.conv.weight": (8, 8, 3),
    }
    assert linear_names(shapes) == ["gate_up_proj", "q_proj"]


def adapter(*modules: str, rank: int = 2, inputs: int = 8) -> Arrived:
    shapes = {"A": (rank, inputs), "B": (6, rank)}
    return [(f"base_model.model.{m}.lora_{x}.weight", s, torch.float32) for m in modules for x, s in shapes.items()]


def test_first_adapter_decides_which_modules_the_next_ones_have() -> None:
    manifest = AdapterManifest(2, {"l.0.q.weight": (6, 8)}, lambda module: module != "head")
    both = [*adapter("l.0.q"), *adapter("l.0.k", inputs=9)]
    name = "base_model.model.l.0.q.lora_"
    assert manifest.check(adapter("l.0.q", rank=3)) == [
        f"2 of another shape: {name}A.weight [3, 8], not [2, 8], {name}B.weight [6, 3], not [6, 2]"
    ]
    assert manifest.check(adapter("l.0.q", inputs=9)) == [f"1 of another shape: {name}A.weight [2, 9], not [2, 8]"]
    assert manifest.check(adapter("l.0.q")[:1]) == [f"1 missing: {name}B.weight"]
    assert manifest.check(adapter("l.0.q", "head")) == ["1 modules that vLLM cannot adapt: head"]
    assert manifest.check(both) == manifest.check(both[::-1]) == []
    k = "base_model.model.l.0.k.lora_"
    assert manifest.check(adapter("l.0.q")) == [f"2 missing: {k}A.weight, {k}B.weight"]
    v = "base_model.model.l.0.v.lora_"
    assert manifest.check([*both, *adapter("l.0.v")]) == [f"2 unexpected: {v}A.weight, {v}B.weight"]
    nothing = "no tensor of an adapter in PEFT's layout (base_model.model.<module>.lora_A.weight)"
    assert manifest.check([]) == [nothing]
