"""The folder of a run: its location, its first files, and the checkpoint to resume from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from roll_gspo.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from roll_gspo.config.run import RunConfig
from roll_gspo.errors import CheckpointError, ConfigError
from roll_gspo.pipelines.launches import record_launch

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    Attributes:
        path: the run's own folder.
        checkpoints: its checkpoints.
        log_folder: folder of `run.log`.
        resumed_from: the checkpoint to resume from, or None.
    """

    path: Path
    checkpoints: Path
    log_folder: Path
    resumed_from: Checkpoint | None


def open_run_folder(config: RunConfig, plan_text: str) -> RunFolder:
    """Create or find the folder of the run, and write `config.yaml` and `plan.txt` into it.

    `resume_from_checkpoint: true` resumes in the folder of the run with the newest checkpoint. A path starts a
    new folder, so that the later results of the old run are kept.

    Raises:
        ConfigError: a folder cannot be written or holds another run's results, or the requested checkpoint is missing
            or incomplete.
    """
    experiment = Path(config.output_dir) / config.exp_name
    saved = Path(config.checkpoint_config.output_dir or config.output_dir) / config.exp_name
    name = config.run_name or time.strftime("%Y%m%d-%H%M%S")
    checkpoint = None
    if config.resume_from_checkpoint is True:
        checkpoint = newest_checkpoint(saved, config.run_name)
        if checkpoint is not None:
            name = checkpoint.folder.parent.parent.name
    elif config.resume_from_checkpoint:
        try:
            checkpoint = open_checkpoint(Path(str(config.resume_from_checkpoint)))
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
    path = experiment / name
    if config.run_name is None and checkpoint is None:
        path = unused(path)
    folder = RunFolder(
        path,
        saved / path.name / "checkpoints",
        Path(config.logging_dir) / config.exp_name / path.name if config.logging_dir else path,
        checkpoint,
    )
    if config.resume_from_checkpoint is not True:
        _refuse_to_overwrite(folder)
    make_folder(folder.path, "output_dir")
    make_folder(folder.checkpoints, "checkpoint_config.output_dir")
    make_folder(folder.log_folder, "logging_dir")
    (path / "config.yaml").write_text(config_yaml(config), encoding="utf-8")
    (path / "plan.txt").write_text(plan_text + "\n", encoding="utf-8")
    record_launch(path)
    return folder


def config_yaml(config: RunConfig) -> str:
    """Return the whole configuration, defaults included, as YAML that reproduces the run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def unused(path: Path) -> Path:
    """Return the first of path, path-2, path-3, ... that does not exist. Two runs may start in the same second."""
    candidates = (path.with_name(f"{path.name}-{n}") for n in range(2, 1000))
    return path if not path.exists() else next(c for c in candidates if not c.exists())


def _refuse_to_overwrite(folder: RunFolder) -> None:
    """Reject a folder with results, because trackers drop metrics from the first new step on. Resuming is allowed."""
    source = folder.resumed_from
    goes_on = source is not None and source.folder.parent.resolve() == folder.checkpoints.resolve()
    if not goes_on and (folder.path / METRICS).exists():
        raise ConfigError(
            f"run_name: {folder.path} holds the results of a run already; choose another run_name, or go on with it: "
            "resume_from_checkpoint=true"
        )


def make_folder(folder: Path, key: str) -> None:
    """Create `folder` and check that it is writable.

    Raises:
        ConfigError: the folder is not writable; the message names `key`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{key}: {folder} cannot be written ({error}); choose another folder") from error
