from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from composed import load_config
from safetensors.torch import load_file

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.pipelines.pretrain import prepare_checkpoint
from roll_gspo.tracking.console import Console

BUILTIN = "builtin:tiny_qwen3"


def config(tmp_path: Path, *overrides: str) -> ExperimentConfig:
    return load_config("example_gspo", f"output_dir={tmp_path}", "warm_start.batch_size=4", *overrides).config


def prepared(tmp_path: Path, *overrides: str, name: str = BUILTIN) -> Path:
    with Console("test", 1, tmp_path) as console:
        return prepare_checkpoint(config(tmp_path, *overrides), name, console)


def test_model_is_made_once_for_all_seeds_and_anew_for_another_recipe(tmp_path: Path) -> None:
    first = prepared(tmp_path, "warm_start.steps=2")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    again = prepared(tmp_path, "warm_start.steps=2", "seed=1", "max_steps=3")
    assert again == first and (first / "model.safetensors").stat().st_mtime_ns == stamp
    other = prepared(tmp_path, "warm_start.steps=3")
    assert other != first
    one, two = (load_file(folder / "model.safetensors") for folder in (first, other))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in (tmp_path / "pretrained").iterdir()) == sorted([first.name, other.name])
    assert json.loads((other / "made_by.json").read_text())["warm_start"]["steps"] == 3


def test_warm_start_makes_the_same_model_from_the_same_recipe(tmp_path: Path) -> None:
    one, two = (prepared(tmp_path / part, "warm_start.steps=3") for part in "ab")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_folder_is_taken_as_it_is(tmp_path: Path, pretrained: Path) -> None:
    assert prepared(tmp_path, "warm_start=null", name=str(pretrained)) == pretrained


def test_killed_making_leaves_no_model_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object) -> None:
        Path(str(arguments[2])).mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("roll_gspo.models.tiny.save", killed)
        prepared(tmp_path, "warm_start=null")
    assert all(path.name.startswith(".") for path in (tmp_path / "pretrained").iterdir())
    assert (prepared(tmp_path, "warm_start=null") / "model.safetensors").is_file()
