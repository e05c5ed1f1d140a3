"""The FSDP2 engine computes what plain transformers computes, for any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp2_cases import largest_share, trained, valued
from ranks import Ranks
from tiny_models import write_model

PACKED = {"use_sequence_packing": True}
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("qwen3_tied", 1, {}),
    ("qwen3_tied", 2, {}),
    ("qwen3_tied", 2, {**PACKED, "gradient_checkpointing": True}),
    ("qwen3_tied", 4, {**PACKED, "reshard_after_forward": False}),
    ("qwen2", 2, {"cpu_offload": True}),
    ("llama", 2, PACKED),
    ("qwen3_moe", 2, PACKED),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = sorted({family for family, _, _ in CASES})
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in families}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return {family: trained(folder, None) for family, folder in folders.items()}


@pytest.mark.parametrize(("family", "world_size", "options"), CASES)
def test_training_is_that_of_one_process(
    family: str,
    world_size: int,
    options: dict[str, Any],
    folders: dict[str, Path],
    expected: dict[str, dict[str, Any]],
    ranks: Ranks,
) -> None:
    of_ranks = ranks.run(world_size, trained, folders[family], options)
    want = expected[family]
    for found in of_ranks:
        for mine, other in zip(found["scores"], want["scores"], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
        for mine, other in zip(found["updates"], want["updates"], strict=True):
            assert mine == pytest.approx(other, rel=1e-5)
        for mine, other in zip(found["metrics"], want["metrics"], strict=True):
            assert mine == pytest.approx(other, rel=1e-5)
        assert list(found["weights"]) == list(want["weights"])
        for name, weight in want["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5, msg=name)


def test_a_critic_is_that_of_one_process(folders: dict[str, Path], ranks: Ranks) -> None:
    torch.set_num_threads(1)
    want = valued(folders["qwen3_tied"], None)
    for found in ranks.run(2, valued, folders["qwen3_tied"], PACKED):
        for mine, other in zip(found["values"], want["values"], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
        for mine, other in zip(found["updates"], want["updates"], strict=True):
            assert mine == pytest.approx(other, rel=1e-5)


def test_micro_batches_change_nothing(
    folders: dict[str, Path], expected: dict[str, dict[str, Any]], ranks: Ranks
) -> None:
    for found in ranks.run(2, trained, folders["qwen3_tied"], PACKED, torch.float32, 4):
        for mine, other in zip(found["updates"], expected["qwen3_tied"]["updates"], strict=True):
            assert mine == pytest.approx(other, rel=1e-5)


def test_half_precision_stays_near(folders: dict[str, Path], expected: dict[str, dict[str, Any]], ranks: Ranks) -> None:
    want = expected["qwen3_tied"]
    for found in ranks.run(2, trained, folders["qwen3_tied"], PACKED, torch.bfloat16):
        torch.testing.assert_close(found["scores"][0], want["scores"][0], rtol=0, atol=0.2)
        assert found["updates"][0] == pytest.approx(want["updates"][0], rel=0.02)
        for name, weight in want["weights"].items():
            assert found["weights"][name].dtype == torch.bfloat16
            torch.testing.assert_close(found["weights"][name].float(), weight, rtol=0.01, atol=8e-3, msg=name)


def test_a_rank_holds_its_part_only(folders: dict[str, Path], ranks: Ranks) -> None:
    shares = ranks.run(4, largest_share, folders["llama"])
    assert all(share < 0.3 for share in shares)
