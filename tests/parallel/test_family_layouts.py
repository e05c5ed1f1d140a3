"""Parallel layouts of families whose layers differ from Qwen's: they compute and resume what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import trained
from ranks import Ranks
from state_cases import resumed, saved
from tiny_models import write_model

pytestmark = pytest.mark.megatron

Layout = dict[str, Any]
TP, PP, CP, EP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
SP, PACKED = "sequence_parallel", "use_sequence_packing"
CASES: dict[str, dict[str, Layout]] = {
    "gemma3": {
        "tp2": {TP: 2},
        "tp2_sp_packed": {TP: 2, SP: True, PACKED: True},
        "pp2": {PP: 2},
        "cp2": {CP: 2},
        "cp2_packed": {CP: 2, PACKED: True},
    },
    "olmo2": {"tp2": {TP: 2}, "tp2_sp_packed": {TP: 2, SP: True, PACKED: True}, "pp2": {PP: 2}},
    "glm4": {"tp2_sp_packed": {TP: 2, SP: True, PACKED: True}, "pp2": {PP: 2}},
    "phi3": {"tp2": {TP: 2}, "cp2_packed": {CP: 2, PACKED: True}},
    "mixtral": {"ep2": {EP: 2}, "tp2_sp": {TP: 2, SP: True}},
}

# Layouts whose settings all occur in another case of a similar family; they run with `long`.
COVERED = {("gemma3", "tp2"), ("gemma3", "cp2"), ("olmo2", "pp2"), ("glm4", "pp2"), ("phi3", "cp2_packed")}
COVERED |= {("olmo2", "tp2_sp_packed"), ("mixtral", "tp2_sp")}
PAIRS = [
    pytest.param(family, name, marks=[pytest.mark.long] if (family, name) in COVERED else [])
    for family, layouts in CASES.items()
    for name in layouts
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in CASES}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], ranks: Ranks) -> dict[str, dict[str, Any]]:
    return {family: ranks.run(1, trained, folder, {})[0] for family, folder in folders.items()}


@pytest.mark.parametrize(("family", "layout"), PAIRS)
def test_layout_computes_what_one_process_computes(
    folders: dict[str, Path], alone: dict[str, dict[str, Any]], ranks: Ranks, family: str, layout: str
) -> None:
    want = alone[family]
    for got in ranks.run(2, trained, folders[family], CASES[family][layout]):
        for ours, theirs in zip(got["updates"], want["updates"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        for ours, theirs in zip(got["scores"], want["scores"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
        assert got["weights"].keys() == want["weights"].keys()
        for name, weight in want["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [pytest.param("gemma3", marks=pytest.mark.long), "olmo2"])
def test_state_of_two_tensor_ranks_goes_on_in_one_process(
    folders: dict[str, Path], tmp_path: Path, ranks: Ranks, family: str
) -> None:
    state = tmp_path / "state"
    want = ranks.run(2, saved, folders[family], {TP: 2}, state)[0]
    (got,) = ranks.run(1, resumed, folders[family], {}, state)
    for ours, theirs in zip(got["updates"], want["updates"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    for name, weight in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=1e-5)
