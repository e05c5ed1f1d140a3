from __future__ import annotations

from pathlib import Path

import pytest
from composed import load_config

from roll_gspo.checkpoint import CheckpointStore
from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.errors import ConfigError
from roll_gspo.pipelines.plan import make_plan
from roll_gspo.pipelines.run_folder import RunFolder, open_run_folder


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(*overrides: str) -> ExperimentConfig:
    return load_config("example_gspo", "output_dir=out", *overrides).config


def opened(*overrides: str) -> RunFolder:
    return open_run_folder(config(*overrides), make_plan(config(*overrides)).text())


def _save(folder: RunFolder, step: int) -> Path:
    with CheckpointStore(folder.checkpoints, 0).writing(step) as inside:
        (inside / "state.json").write_text("{}")
    return folder.checkpoints / f"step_{step:06d}"


def test_runs_of_one_second_have_folders_of_their_own() -> None:
    folders = {opened().path for _ in range(3)}
    assert len(folders) == 3 and {path.parent for path in folders} == {Path("out/example_gspo")}


def test_folder_tells_what_was_asked_for() -> None:
    folder = opened("run_name=a", "seed=7")
    assert folder.path == Path("out/example_gspo/a") and folder.resumed_from is None
    assert "seed: 7\n" in (folder.path / "config.yaml").read_text()
    assert (folder.path / "plan.txt").read_text() == make_plan(config("run_name=a", "seed=7")).text() + "\n"


def test_checkpoints_and_log_go_where_the_configuration_says() -> None:
    elsewhere = ("run_name=a", "checkpoint_config.output_dir=big", "logging_dir=logs")
    folder = opened(*elsewhere)
    assert folder.checkpoints == Path("big/example_gspo/a/checkpoints")
    assert folder.log_folder == Path("logs/example_gspo/a")
    step = _save(folder, 2)
    for resume in ("true", str(step)):
        again = opened(*elsewhere, f"resume_from_checkpoint={resume}")
        assert again.resumed_from is not None and again.resumed_from.folder == step


def test_resume_true_finds_the_newest_run_and_a_path_starts_a_new_one() -> None:
    first, second = opened("run_name=a"), opened("run_name=b")
    step = _save(first, 4)
    _save(second, 2)
    newest = opened("resume_from_checkpoint=true")
    assert newest.path == second.path and newest.resumed_from is not None and newest.resumed_from.step == 2
    fork = opened(f"resume_from_checkpoint={step}", "run_name=c")
    assert fork.path.name == "c" and fork.resumed_from is not None and fork.resumed_from.step == 4


def test_results_are_overwritten_by_no_run_but_their_own() -> None:
    folder = opened("run_name=a")
    step = _save(folder, 1)
    opened("run_name=a")  # nothing is in it yet
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"run_name: out/example_gspo/a holds the results of a run already"):
        opened("run_name=a")
    assert opened("run_name=a", f"resume_from_checkpoint={step}").path == folder.path
    stranger = _save(opened("run_name=b"), 1)
    with pytest.raises(ConfigError, match="choose another run_name"):
        opened("run_name=a", f"resume_from_checkpoint={stranger}")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("output_dir=taken", "output_dir"),
        ("checkpoint_config.output_dir=taken", "checkpoint_config.output_dir"),
        ("logging_dir=taken", "logging_dir"),
    ],
)
def test_folder_that_cannot_be_written_is_named_with_its_key(override: str, key: str) -> None:
    Path("taken").touch()
    with pytest.raises(ConfigError, match=rf"^{key}: taken/example_gspo/.* cannot be written .*choose another folder"):
        opened(override)
