"""Atomic checkpoints: written to a temporary folder, synced, marked as complete, then renamed.

A checkpoint is a folder `step_000020` that holds its files and a marker with the size of each file. A folder without
the marker, or with a missing or truncated file, is never resumed from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from roll_gspo.errors import CheckpointError, RollGspoError, WorkerError

MARKER = "COMPLETE.json"
BEST = "best.json"
HF_EXPORT = "actor_train_hf"  # the policy in Hugging Face layout, written if `save_hf_model` is true
_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Best:
    """The best checkpoint by a validation metric.

    Attributes:
        step: the step after which it was saved.
        metric: name of the metric.
        mode: `max` or `min`: whether larger or smaller values are better.
        value: value of the metric.
    """

    step: int
    metric: str
    mode: str
    value: float


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: created with the first checkpoint.
        max_to_keep: number of checkpoints to keep; older ones except the best are deleted after each save. 0 keeps all.
        best: the best checkpoint so far; dropped if `folder` does not hold it.
    """

    def __init__(self, folder: Path, max_to_keep: int, best: Best | None = None) -> None:
        self.folder = folder
        self._max_to_keep = max_to_keep
        self.best = best if best is not None and is_complete(self._target(best.step)) else None
        if self.best is None:  # left by an earlier attempt whose later steps are repeated
            (folder / BEST).unlink(missing_ok=True)
        else:
            self._mark(self.best)  # the process may have been killed between the rename and the mark

    @contextmanager
    def writing(self, step: int, best: Best | None = None) -> Iterator[Path]:
        """Yield a folder to fill; on a normal exit it becomes the checkpoint of `step` (see `complete`).

        Raises:
            CheckpointError: the files cannot be written; earlier checkpoints are untouched.
        """
        folder = self.begin(step)
        with self.filling(step):
            yield folder
        self.complete(step, best)

    def begin(self, step: int) -> Path:
        """Create the folder for the checkpoint of `step`.

        Fill it inside `filling`, any number of times, then call `complete`. Only one checkpoint can be open at a time.

        Raises:
            CheckpointError: the folder cannot be created.
        """
        aside = self._aside(step)
        with self.filling(step):
            self._remove_leftovers()
            aside.mkdir(parents=True)
        return aside

    @contextmanager
    def filling(self, step: int) -> Iterator[None]:
        """Guard writes to the open checkpoint; an error deletes the incomplete folder.

        Raises:
            CheckpointError: the files cannot be written; earlier checkpoints are untouched.
        """
        try:
            yield
        except BaseException as error:
            shutil.rmtree(self._aside(step), ignore_errors=True)
            # Not only OSError: torch and safetensors raise other types for a full disk, and workers send text.
            is_explained = isinstance(error, RollGspoError) and type(error) is not WorkerError
            if is_explained or not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"{self._target(step)}: cannot be written ({error}); free space or set checkpoint_config.output_dir. "
                "Earlier checkpoints are untouched"
            ) from error

    def complete(self, step: int, best: Best | None = None) -> None:
        """Mark the open checkpoint as complete, rename it, update `best.json` and delete old checkpoints.

        Args:
            step: step of the checkpoint.
            best: the best checkpoint, this one included; None leaves it unchanged.

        Raises:
            CheckpointError: the files cannot be written; earlier checkpoints are untouched.
        """
        target, aside = self._target(step), self._aside(step)
        with self.filling(step):
            _seal(aside, step)
            if target.exists():  # rename, do not delete: a kill must not leave this step without a checkpoint
                target.rename(aside.with_suffix(".old.tmp"))
            aside.rename(target)
            _sync(self.folder)
            self._remove_leftovers()
            if best is not None and best != self.best:
                self._mark(best)
                self.best = best
        self._prune(step)

    def _target(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def _aside(self, step: int) -> Path:
        return self.folder / f".step_{step:06d}.{os.getpid()}.tmp"

    def _remove_leftovers(self) -> None:
        """Delete incomplete files of a killed process."""
        for leftover in self.folder.glob(".step_*.tmp"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def _mark(self, best: Best) -> None:
        aside = self.folder / f".step_{best.step:06d}.{os.getpid()}.{BEST}.tmp"
        aside.write_text(json.dumps(asdict(best), indent=1), encoding="utf-8")
        _sync(aside)
        aside.replace(self.folder / BEST)
        _sync(self.folder)

    def _prune(self, step: int) -> None:
        """Delete old checkpoints, first any later steps: they precede a resume from an earlier step."""
        if self._max_to_keep:
            found = sorted(complete_checkpoints(self.folder), key=lambda c: (c.step <= step, c.step))
            for old in found[: -self._max_to_keep]:
                if self.best is None or old.step != self.best.step:
                    shutil.rmtree(old.folder, ignore_errors=True)


class BackgroundWrite:
    """A write in a background thread while training continues.

    The process does not exit before the write is finished.

    Args:
        write: the function to run; it must not touch data that training changes.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._error: BaseException | None = None

        def run() -> None:
            try:
                write()
            except BaseException as error:  # raised by `wait`
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    @property
    def done(self) -> bool:
        """True if `wait` would not block."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the write to finish; raise its exception, if any."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a folder, lowest step first."""
    found = []
    for candidate in folder.glob("step_*"):
        match = _NAME.fullmatch(candidate.name)
        if match and is_complete(candidate):
            found.append(Checkpoint(int(match[1]), candidate))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def is_complete(folder: Path) -> bool:
    """Return whether the marker exists and every file has the size that the marker lists."""
    return damage(folder) is None


def damage(folder: Path) -> str | None:
    """Return why a folder is no complete checkpoint; None if it is one."""
    try:
        parts = json.loads((folder / MARKER).read_text(encoding="utf-8"))["parts"]
        for name, size in parts.items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes, {size} were written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).relative_to(folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # truncated or foreign JSON
        return f"{MARKER} cannot be read"
    return None


def damaged_checkpoints(folder: Path, after: int = -1) -> dict[Path, str]:
    """Return the damaged checkpoints of a folder later than step `after`, each with what is wrong."""
    found = {}
    for candidate in sorted(folder.glob("step_*")):
        match = _NAME.fullmatch(candidate.name)
        if match and int(match[1]) > after and (problem := damage(candidate)) is not None:
            found[candidate] = problem
    return found


def open_checkpoint(path: Path, key: str = "resume_from_checkpoint") -> Checkpoint:
    """Return the checkpoint that a user's path names.

    Args:
        path: a checkpoint folder, its `best.json`, or a run or `checkpoints` folder, which stands for its newest one.
        key: the configuration key that holds the path, for errors.

    Raises:
        CheckpointError: the path holds no complete checkpoint.
    """
    if path.name == BEST and (best := read_best(path.parent)) is not None:
        path = path.parent / f"step_{best.step:06d}"
    match = _NAME.fullmatch(path.name)
    if match and is_complete(path):
        return Checkpoint(int(match[1]), path)
    found = complete_checkpoints(path) or complete_checkpoints(path / "checkpoints")
    if found:
        return max(found, key=_completed)
    other = "true" if key == "resume_from_checkpoint" else "RUN"
    state = "does not exist"
    if path.is_dir():
        torn = {path: damage(path)} if match else damaged_checkpoints(path) or damaged_checkpoints(path / "checkpoints")
        state = "is incomplete" + "".join(f" ({folder.name}: {problem})" for folder, problem in torn.items())
    raise CheckpointError(f"{key}: {path} {state}; give a folder such as RUN/checkpoints/step_000020, or {other}")


def read_best(folder: Path) -> Best | None:
    """Read `best.json` of a `checkpoints` folder; None if it does not exist or is unreadable."""
    try:
        return Best(**json.loads((folder / BEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def newest_checkpoint(experiment_folder: Path, run_name: str | None) -> Checkpoint | None:
    """Return the last completed checkpoint of an experiment, or of its run `run_name` if given; None without any."""
    runs = [experiment_folder / run_name] if run_name else list(experiment_folder.glob("*"))
    found = [c for run in runs for c in complete_checkpoints(run / "checkpoints")]
    return max(found, key=_completed, default=None)


def _completed(checkpoint: Checkpoint) -> tuple[float, int]:
    """Sort key: the completion time from the marker, because copies have other file times."""
    try:
        marker = json.loads((checkpoint.folder / MARKER).read_text(encoding="utf-8"))
    except OSError:  # a running training has just pruned it: another is newer
        return -1.0, checkpoint.step
    return marker.get("completed", 0.0), checkpoint.step


def _seal(folder: Path, step: int) -> None:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in files:
        _sync(file)
    parts = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    marker = folder / MARKER
    marker.write_text(json.dumps({"step": step, "completed": time.time(), "parts": parts}, indent=1), encoding="utf-8")
    _sync(marker)
    for sub in {file.parent for file in files} | {folder}:
        _sync(sub)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
