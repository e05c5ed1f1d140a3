"""Checkpoints that are complete or absent: written aside, synced, marked, renamed.

A checkpoint is a folder `step_000020` with the parts that its writer put there and a marker that lists them
with their sizes. A folder without the marker, or with a part missing or cut short, is never resumed from.
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
HF_EXPORT = "actor_train_hf"  # the policy in Hugging Face layout, where `save_hf_model` asks for it
_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Best:
    """The best checkpoint by a figure of the validation.

    Attributes:
        step: that it was saved after.
        metric: the figure's name.
        mode: `max` or `min`, which values are better.
        value: of the figure.
    """

    step: int
    metric: str
    mode: str
    value: float


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: made with the first checkpoint.
        max_to_keep: older ones, but for the best, are deleted after a new one is complete; 0 keeps all.
        best: the best one so far; without its checkpoint in `folder` there is none.
    """

    def __init__(self, folder: Path, max_to_keep: int, best: Best | None = None) -> None:
        self.folder = folder
        self._max_to_keep = max_to_keep
        self.best = best if best is not None and is_complete(self._target(best.step)) else None
        if self.best is None:  # what lies there is of another attempt, whose later steps will be taken anew
            (folder / BEST).unlink(missing_ok=True)
        else:
            self._mark(self.best)  # the process may have been killed between the checkpoint and its mark

    @contextmanager
    def writing(self, step: int, best: Best | None = None) -> Iterator[Path]:
        """Yield a folder to fill; on leaving without an error it becomes the checkpoint of `step`: see `complete`.

        Raises:
            CheckpointError: the disk refuses; earlier checkpoints are untouched.
        """
        folder = self.begin(step)
        with self.filling(step):
            yield folder
        self.complete(step, best)

    def begin(self, step: int) -> Path:
        """A folder to fill within `filling`, as often as it takes; `complete` makes it the checkpoint of `step`.

        One checkpoint is written at a time.

        Raises:
            CheckpointError: the disk refuses.
        """
        aside = self._aside(step)
        with self.filling(step):
            self._remove_leftovers()
            aside.mkdir(parents=True)
        return aside

    @contextmanager
    def filling(self, step: int) -> Iterator[None]:
        """An error inside deletes what there is of the checkpoint.

        Raises:
            CheckpointError: the disk refuses; earlier checkpoints are untouched.
        """
        try:
            yield
        except BaseException as error:
            shutil.rmtree(self._aside(step), ignore_errors=True)
            # Not only OSError: torch and safetensors report a full disk with errors of their own, workers by the text.
            told_already = isinstance(error, RollGspoError) and type(error) is not WorkerError
            if told_already or not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"{self._target(step)}: cannot be written ({error}); free space or set checkpoint_config.output_dir. "
                "Earlier checkpoints are untouched"
            ) from error

    def complete(self, step: int, best: Best | None = None) -> None:
        """Seal what was filled and give it its name, then name the best checkpoint and delete what is too old.

        Args:
            step: of the checkpoint.
            best: which is the best one now, this one included; None: as before.

        Raises:
            CheckpointError: the disk refuses; earlier checkpoints are untouched.
        """
        target, aside = self._target(step), self._aside(step)
        with self.filling(step):
            _seal(aside, step)
            if target.exists():  # moved away, not deleted first: the time without a checkpoint of this step is a rename
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
        """Delete what a killed process left half-written."""
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
        """Delete what is too old: later steps first, which are of the attempt before a return to an earlier step."""
        if self._max_to_keep:
            found = sorted(complete_checkpoints(self.folder), key=lambda c: (c.step <= step, c.step))
            for old in found[: -self._max_to_keep]:
                if self.best is None or old.step != self.best.step:
                    shutil.rmtree(old.folder, ignore_errors=True)


class BackgroundWrite:
    """Something that is written by a thread while training goes on.

    The process does not end before it is done.

    Args:
        write: touches nothing that training changes.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._error: BaseException | None = None

        def run() -> None:
            try:
                write()
            except BaseException as error:  # raised where it is waited for
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is written; raises what the writing raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every complete checkpoint of a folder, oldest step first."""
    found = []
    for candidate in folder.glob("step_*"):
        match = _NAME.fullmatch(candidate.name)
        if match and is_complete(candidate):
            found.append(Checkpoint(int(match[1]), candidate))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def is_complete(folder: Path) -> bool:
    """Whether the marker is there and every part has the size that it lists."""
    try:
        parts = json.loads((folder / MARKER).read_text(encoding="utf-8"))["parts"]
        return all((folder / name).stat().st_size == size for name, size in parts.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # torn, or not this JSON at all
        return False


def open_checkpoint(path: Path, key: str = "resume_from_checkpoint") -> Checkpoint:
    """The checkpoint at a path that a user gave: its folder or `best.json`, or a run or `checkpoints` (its newest).

    Args:
        path: what was given.
        key: what it was given for.

    Raises:
        CheckpointError: there is none, or it is incomplete.
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
    state = "is incomplete" if path.is_dir() else "does not exist"
    raise CheckpointError(f"{key}: {path} {state}; give a folder such as RUN/checkpoints/step_000020, or {other}")


def read_best(folder: Path) -> Best | None:
    """What `best.json` of a `checkpoints` folder says; None without one that can be read."""
    try:
        return Best(**json.loads((folder / BEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def newest_checkpoint(experiment_folder: Path, run_name: str | None) -> Checkpoint | None:
    """The last completed checkpoint of an experiment (of its run `run_name`, if given), or None."""
    runs = [experiment_folder / run_name] if run_name else list(experiment_folder.glob("*"))
    found = [c for run in runs for c in complete_checkpoints(run / "checkpoints")]
    return max(found, key=_completed, default=None)


def _completed(checkpoint: Checkpoint) -> tuple[float, int]:
    """Sorts by when they were completed, which the marker says: copies have file times of their own."""
    try:
        marker = json.loads((checkpoint.folder / MARKER).read_text(encoding="utf-8"))
    except OSError:  # a run that goes on has just deleted it: another is newer
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
