"""Datasets read with the `datasets` library: saved datasets, folders of files, and names on the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from roll_gspo.data.hf_datasets import DatasetName, parse_dataset_name
from roll_gspo.data.rows import DataRow, ReadOptions, read_rows
from roll_gspo.errors import DataError, MissingDependencyError

KEY = "actor_train.data_args.file_name"
ROWS = [{"question": f"{i}+1?", "answer": f"so #### {i + 1}"} for i in range(3)]


def read(name: Path | str, config: str | None = None, split: str | None = None) -> list[DataRow]:
    return read_rows([str(name)], KEY, options=ReadOptions(dataset_config=config, split=split))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, None)),
        ("openai/gsm8k@main", ("openai/gsm8k", "main", None)),
        ("openai/gsm8k:train[:10]", ("openai/gsm8k", None, "train[:10]")),
        ("openai/gsm8k@main:test", ("openai/gsm8k", "main", "test")),
        *((name, None) for name in ("data/rows.jsonl", "rows.jsonl", "train", "/data/rows", "data/rows.jsonl.gz")),
    ],
)
def test_parse_dataset_name(text: str, parts: tuple[str, str | None, str | None] | None) -> None:
    assert parse_dataset_name(text) == (DatasetName(*parts) if parts else None)


def test_missing_library_raises_with_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"openai/gsm8k needs the package 'datasets': .*roll-gspo\[data\]"):
        read("openai/gsm8k")


def test_split_of_a_file_raises(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(DataError, match=rf"^{KEY}: split is 'train', .*rows\.jsonl"):
        read(tmp_path / "rows.jsonl", split="train")


def test_saved_dataset_is_read_by_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one, both = tmp_path / "one", tmp_path / "both"
    train = datasets.Dataset.from_list(ROWS)
    train.save_to_disk(one)
    rows = read(one)
    assert [row.ground_truth for row in rows] == ["1", "2", "3"]
    assert rows[1].id == f"{one}[1]" and rows[1].extra == {"source": "one"}
    with pytest.raises(DataError, match=f"{one} .*split is 'test'"):
        read(f"{one}:test")
    datasets.DatasetDict({"train": train, "test": datasets.Dataset.from_list(ROWS[2:])}).save_to_disk(both)
    with pytest.raises(DataError, match=r"several splits \(known: train, test\)"):
        read(both)
    assert [row.ground_truth for row in read(both, split="test")] == ["3"]
    assert [row.id for row in read(f"{both}:test")] == [f"{both}:test[0]"]
    with pytest.raises(DataError, match=r"no split 'dev' \(known: train, test\)"):
        read(both, split="dev")


def test_folder_of_files_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row.ground_truth for row in read(folder)] == ["1", "2", "3"]
    assert [row.ground_truth for row in read(f"{folder}:train[:2]")] == ["1", "2"]
    (folder / "train.jsonl").write_text("{")
    with pytest.raises(DataError, match=f"^{KEY}: the folder {folder} "):
        read(folder)


def test_unreachable_hub_raises_with_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=f"^{KEY}: 'nobody/nothing' "):
        read("nobody/nothing@main:train")
