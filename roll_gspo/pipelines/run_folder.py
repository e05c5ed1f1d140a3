"""The folder of a run: its location, its first files, and the checkpoint to resume from."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from roll_gspo.checkpoint import Checkpoint, damaged_checkpoints, newest_checkpoint, open_checkpoint
from roll_gspo.config.run import RunConfig
from roll_gspo.errors import CheckpointError, ConfigError
from roll_gspo.pipelines.launches import record_launch
from roll_gspo.pipelines.resume_changes import CONFIG, changes_since, check_changes
from roll_gspo.pipelines.run_lock import check_unlocked, lock, unlock

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    Attributes:
        path: the run's own folder.
        checkpoints: its checkpoints.
        log_folder: folder of `run.log`.
        resumed_from: the checkpoint to resume from, or None.
        notes: what a person must know about the resumed run: changed keys, damaged checkpoints.
    """

    path: Path
    checkpoints: Path
    log_folder: Path
    resumed_from: Checkpoint | None
    notes: tuple[str, ...] = ()

    @property
    def continues(self) -> bool:
        """True if the run goes on in the folder of its checkpoint."""
        source = self.resumed_from
        return source is not None and source.folder.parent.resolve() == self.checkpoints.resolve()

    def lock(self) -> None:
        """Let no other process write into the run's folder or its checkpoints, until `unlock`.

        Raises:
            ConfigError: another process does.
        """
        lock(self.path, "run_name")
        if self.checkpoints.parent != self.path:
            lock(self.checkpoints.parent, "checkpoint_config.output_dir")

    def unlock(self) -> None:
        """Release what `lock` took."""
        unlock(self.path)
        unlock(self.checkpoints.parent)


def find_run_folder(config: RunConfig) -> RunFolder:
    """Find the folder of the run and the checkpoint to resume from, and check both. Nothing is written.

    Raises:
        ConfigError: the folder holds another run's results or another process writes into it; the requested checkpoint
            is missing or incomplete, or the configuration has changed since (see `check_changes`).
    """
    experiment = Path(config.output_dir) / config.exp_name
    saved = Path(config.checkpoint_config.output_dir or config.output_dir) / config.exp_name
    name = config.run_name or time.strftime("%Y%m%d-%H%M%S")
    checkpoint = None
    if config.resume_from_checkpoint is True:
        checkpoint = newest_checkpoint(saved, config.run_name)
        if checkpoint is not None:
            name = checkpoint.folder.parent.parent.name
        else:
            _refuse_damaged(saved, config.run_name)
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
        tuple(_notes(config, checkpoint)) if checkpoint is not None else (),
    )
    if config.resume_from_checkpoint is not True:
        _refuse_to_overwrite(folder)
    check_unlocked(folder.path, "run_name")
    check_unlocked(folder.checkpoints.parent, "checkpoint_config.output_dir")
    return folder


def open_run_folder(config: RunConfig, plan_text: str) -> RunFolder:
    """Create or find the folder of the run, lock it, and write `config.yaml` and `plan.txt` into it.

    `resume_from_checkpoint: true` resumes in the folder of the run with the newest checkpoint. There, the first files
    stay, and those of the resumed run have the step in their names. A path starts a new folder, so that the later
    results of the old run are kept. The caller unlocks the folder.

    Raises:
        ConfigError: see `find_run_folder`; or a folder cannot be written.
    """
    folder = find_run_folder(config)
    while config.run_name is None and folder.resumed_from is None and not _created(folder.path):
        folder = find_run_folder(config)  # another run of this second was faster
    make_folder(folder.path, "output_dir")
    make_folder(folder.checkpoints, "checkpoint_config.output_dir")
    make_folder(folder.log_folder, "logging_dir")
    folder.lock()
    if config.resume_from_checkpoint is not True:
        _refuse_to_overwrite(folder)  # a run may have ended between the check and the lock
    for name, text in ((CONFIG, config_yaml(config)), ("plan.txt", plan_text + "\n")):
        file = folder.path / name
        if folder.continues and folder.resumed_from is not None and file.exists():
            file = unused(file.with_name(f"{file.stem}.resume-{folder.resumed_from.step:06d}{file.suffix}"))
        file.write_text(text, encoding="utf-8")
    record_launch(folder.path)
    return folder


def _created(path: Path) -> bool:
    """Create a folder; return whether it did not exist before."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return path.parent.is_file()  # `make_folder` reports this and other errors
    except OSError:
        pass
    return True


def _notes(config: RunConfig, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield what a person must know about the resumed run.

    Raises:
        ConfigError: a change makes the numbers incomparable.
    """
    if config.resume_from_checkpoint is True:
        for damaged, problem in damaged_checkpoints(checkpoint.folder.parent, checkpoint.step).items():
            yield f"damaged checkpoint skipped: {damaged} ({problem})"
    changes = changes_since(checkpoint.folder, config)
    check_changes(changes, checkpoint.folder, config)
    if changes:
        yield f"changed since step {checkpoint.step}: {', '.join(map(str, changes))}"


def _refuse_damaged(saved: Path, run_name: str | None) -> None:
    """Reject checkpoints that are all damaged: a new start would drop the results of their run."""
    for run in [saved / run_name] if run_name else sorted(saved.glob("*")):
        for folder, problem in damaged_checkpoints(run / "checkpoints").items():
            raise ConfigError(
                f"resume_from_checkpoint: {folder} is damaged ({problem}), and no checkpoint of {saved} is complete; "
                "restore it, or start anew: resume_from_checkpoint=false and another run_name"
            )


def config_yaml(config: RunConfig) -> str:
    """Return the whole configuration, defaults included, as YAML that reproduces the run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def unused(path: Path) -> Path:
    """Return the first of path, path-2, path-3, ... that does not exist. Two runs may start in the same second."""
    candidates = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(2, 1000))
    return path if not path.exists() else next(c for c in candidates if not c.exists())


def _refuse_to_overwrite(folder: RunFolder) -> None:
    """Reject a folder with results, because trackers drop metrics from the first new step on. Resuming is allowed."""
    if not folder.continues and (folder.path / METRICS).exists():
        raise ConfigError(
            f"run_name: {folder.path} holds the results of a run already; choose another run_name, or go on with it: "
            "resume_from_checkpoint=true"
        )


def check_writable(folder: Path, key: str) -> None:
    """Check that `folder` is, or can be made, a folder that this user may write into.

    Raises:
        ConfigError: it cannot; the message names `key`.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"{key}: {folder} cannot be written ({existing} is a file); choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {folder} cannot be written ({existing} is not yours); choose another folder")


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


def nothing_left(step: int, num_steps: int) -> str:
    """Return the warning of a run whose checkpoint is of its last step or a later one."""
    return f"nothing left to train: the checkpoint is of step {step}, and the run has {num_steps}; raise max_steps"
