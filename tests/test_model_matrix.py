"""The model matrix: its page is complete, and a part of it still holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.model_families import FAMILIES
from scripts.model_matrix import BEGIN, END, PAGE, PAIRS, Cell, read_table, run_family, run_pair, table, write_model

RESULTS = read_table(PAGE.read_text())


def test_page_has_every_family_and_pair_of_engines() -> None:
    assert RESULTS.keys() == {(family, pair) for family in FAMILIES for pair in PAIRS}


def test_table_is_read_as_it_was_written() -> None:
    results = {
        ("llama", "hf+hf"): Cell(difference=2e-6),
        ("llama", "hf+vllm"): Cell("not on a CPU"),
        ("qwen3", "megatron+hf"): Cell("is (not) known"),
        ("qwen3", "fsdp2+hf"): Cell("not on a CPU"),
    }
    assert read_table(f"{BEGIN}\n{table(results, 'Written on 2026-01-01.')}{END}") == results


@pytest.mark.parametrize("family", ["mistral", "gemma3", "olmoe"])
def test_family_trains_and_generates_with_transformers(family: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", FAMILIES[family].hf_config)
    cell = run_pair(tmp_path / "model", "hf+hf", tmp_path / "runs")
    assert not cell.reason and cell.difference < 1e-4


@pytest.mark.long
@pytest.mark.vllm
def test_vllm_leaves_the_classes_of_transformers_to_the_trainer(tmp_path: Path) -> None:
    """vLLM changes the class of OLMo 2. The second run builds a trainer and an engine of the changed class."""
    write_model(tmp_path / "model", FAMILIES["olmo2"].hf_config)
    cells = [run_pair(tmp_path / "model", "hf+vllm", tmp_path / number) for number in ("first", "second")]
    assert [cell.reason for cell in cells] == ["", ""]


@pytest.mark.long
@pytest.mark.megatron
@pytest.mark.vllm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_page_tells_which_engines_work(family: str) -> None:
    found = {pair: cell.reason for pair, cell in run_family(FAMILIES[family], PAIRS).items()}
    assert {pair: not reason for pair, reason in found.items()} == {
        pair: not RESULTS[family, pair].reason for pair in PAIRS
    }, found
