"""Expected tensors of a model, read from checkpoint headers, and differences from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from roll_gspo.errors import WeightTransferError
from roll_gspo.strategies.vllm.engine.manifest import differences, expected_shapes


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
