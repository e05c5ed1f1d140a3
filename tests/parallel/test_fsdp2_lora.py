"""An adapter of a sharded model is trained as in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fsdp2_cases import failed_export, refused_adapter, resumed_adapter, trained_adapter
from ranks import Ranks
from tiny_models import write_model
from transformers import AutoModelForCausalLM

PACKED = {"use_sequence_packing": True}
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("qwen3_tied", 1, {}),
    ("qwen3_tied", 2, {**PACKED, "gradient_checkpointing": True}),
    ("qwen3_moe", 2, {"reshard_after_forward": False}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in ("qwen3_tied", "qwen3_moe")}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return {name: trained_adapter(folder, None, tmp_path_factory.mktemp(name)) for name, folder in folders.items()}


@pytest.mark.parametrize(("family", "world_size", "options"), CASES)
def test_training_is_that_of_one_process(
    family: str,
    world_size: int,
    options: dict[str, Any],
    folders: dict[str, Path],
    expected: dict[str, dict[str, Any]],
    ranks: Ranks,
    tmp_path: Path,
) -> None:
    want = expected[family]
    for found in ranks.run(world_size, trained_adapter, folders[family], options, tmp_path):
        for key in ("before", "after", "base"):
            torch.testing.assert_close(found[key], want[key], rtol=0, atol=1e-5, msg=key)
        assert found["base"].equal(found["before"]), "the frozen model did not change"
        for mine, other in zip(found["updates"], want["updates"], strict=True):
            assert mine == pytest.approx(other, rel=1e-5)
        for kind in ("adapter", "merged"):
            assert list(found[kind]) == list(want[kind])
            for name, tensor in want[kind].items():
                torch.testing.assert_close(found[kind][name], tensor, rtol=0, atol=1e-5, msg=name)
    base = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").state_dict()
    for name, tensor in want["adapter"].items():
        own = loaded[name.replace(".weight", ".default.weight")]
        torch.testing.assert_close(own, tensor, rtol=0, atol=1e-5, msg=name)


def test_a_state_is_of_the_adapter_and_resumes(folders: dict[str, Path], ranks: Ranks, tmp_path: Path) -> None:
    state = tmp_path / "state"
    two = ranks.run(2, resumed_adapter, folders["qwen3_tied"], state, None)
    again = ranks.run(2, resumed_adapter, folders["qwen3_tied"], None, state)
    assert again[0]["updates"] == two[0]["updates"], "bit for bit on as many ranks"
    assert all(tensor.equal(again[0]["adapter"][name]) for name, tensor in two[0]["adapter"].items())
    (one,) = ranks.run(1, resumed_adapter, folders["qwen3_tied"], None, state)
    for mine, other in zip(one["updates"], two[0]["updates"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    stored = json.loads((state / "manifest.json").read_text())["tensors"]
    assert len(stored) == len(one["adapter"]) and all(".lora_" in name for name in stored), "no frozen weight"
    for message in ranks.run(2, refused_adapter, folders["qwen3_tied"], state):
        assert "the adapter has rank 4, but actor_train.model_args.lora.rank is 8" in message


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_weights_in_bfloat16_and_dropout(
    world_size: int, folders: dict[str, Path], ranks: Ranks, tmp_path: Path
) -> None:
    options, dropout = {"gradient_checkpointing": True}, 0.25
    first, second = (
        ranks.run(
            world_size, trained_adapter, folders["qwen3_tied"], options, tmp_path / str(run), torch.bfloat16, dropout
        )
        for run in range(2)
    )
    assert first[0]["updates"] == second[0]["updates"]
    assert first[0]["base"].equal(first[0]["before"]) and not first[0]["after"].equal(first[0]["before"])
    assert all(tensor.equal(second[0]["adapter"][name]) for name, tensor in first[0]["adapter"].items())


def test_a_failed_export_fails_on_every_rank(folders: dict[str, Path], ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = ranks.run(2, failed_export, folders["qwen3_tied"], tmp_path / "file" / "adapter")
    assert all("the adapter cannot be written" in text for text in found)
