"""The files of a training state that many ranks write together and any number of ranks read.

The format is that of `torch.distributed.checkpoint`, with a manifest:

    __0_0.distcp, __1_0.distcp, ...   tensors that each rank wrote
    .metadata                         location of each piece of each tensor
    common.pt                         values other than tensors of the model
    manifest.json                     engine, format number, layout, and size and checksum per file; written last

An engine may add files. torch's and megatron's own writers start processes or communicate while training continues.
This one writes in the process, also from a thread. No rank waits for another between its plan and `finish`. An error of
one rank becomes the error of all.
"""

from __future__ import annotations

import json
import traceback
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from roll_gspo.checkpoint import BackgroundWrite
from roll_gspo.errors import CheckpointError
from roll_gspo.strategies.untrusted_state import COMMON, INDEX, check_contents, read_index

MANIFEST = "manifest.json"
_FIRST_ENGINE = "megatron"  # the only one when manifests did not name the engine
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class StateFormat:
    """The format of the states of an engine.

    Attributes:
        engine: name of the engine, the same for its roles.
        number: format number; increase it if older code cannot read the new files.
        earlier: names of files of earlier formats, which had no manifest.
    """

    engine: str
    number: int
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Description of a state, read before its tensors.

    Attributes:
        applied_steps: number of optimizer steps of the state.
        layout: layout of the ranks that wrote it; not needed to read it.
        tensors: whole shapes by name.
    """

    applied_steps: int
    layout: Mapping[str, int | None]
    tensors: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _File:
    """Expected size and checksum of a file."""

    size: int
    crc32: int


@dataclass
class _Part:
    """Files that one rank wrote, or its error."""

    results: Sequence[WriteResult] = ()
    files: Mapping[str, _File] | None = None
    error: str | None = None


class ShardedSave:
    """A state that is being written: all ranks plan it here, each writes its part, and all finish it.

    Args:
        folder: an existing, empty folder on a file system that all ranks share.
        planner: this rank's tensors, read until `write` has returned; set up already.
        common: plain values and CPU tensors of rank 0 that every reader can rely on.
        state_format: format of the engine.
        manifest: manifest of rank 0.
        add_files: writes further files of the engine on rank 0 and returns their names.
    """

    def __init__(
        self,
        folder: Path,
        planner: SavePlanner,
        common: Any,
        state_format: StateFormat,
        manifest: Manifest,
        add_files: Callable[[], Sequence[str]] = lambda: (),
    ) -> None:
        self._folder, self._planner, self._common = folder, planner, common
        self._format, self._manifest, self._add_files = state_format, manifest, add_files
        self._writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
        self._writer.set_up_storage_writer(rank() == 0)
        plans = gathered(self._planner.create_local_plan())
        plans, self._metadata = self._planner.create_global_plan(plans)
        plan = self._writer.prepare_global_plan(plans)[rank()]
        self._plan = self._planner.finish_plan(plan)
        self._part = _Part()

    def write(self) -> None:
        """Write this rank's file without communication. An error is kept for `finish`."""
        try:
            results = self._writer.write_data(self._plan, self._planner).value() if self._plan.items else []
            names = {result.storage_data.relative_path for result in results}
            self._part = _Part(results, {name: _measure(self._folder / name) for name in names})
        except Exception as error:  # torch reports a full disk by other exception types
            self._part = _Part(error=cause(error))

    def finish(self) -> None:
        """Make the folder readable after every rank has written; a collective.

        Raises:
            CheckpointError: a rank could not write; raised on every rank.
        """
        parts = gathered(self._part)
        errors = [f"rank {number}: {part.error}" for number, part in enumerate(parts) if part.error]
        if not errors:
            errors = _on_first_rank(lambda: self._close(parts))
        if errors:
            raise CheckpointError(
                f"{self._folder}: cannot be written ({'; '.join(errors)}); free space. "
                "Earlier checkpoints are untouched"
            )

    def _close(self, parts: Sequence[_Part]) -> None:
        """Write the common files; on rank 0."""
        self._writer.finish(self._metadata, [list(part.results) for part in parts])
        torch.save(self._common, self._folder / COMMON)
        files = {name: file for part in parts for name, file in (part.files or {}).items()}
        for name in (INDEX, COMMON, *self._add_files()):
            files[name] = _measure(self._folder / name)
        document = {
            "engine": self._format.engine,
            "format": self._format.number,
            **asdict(self._manifest),
            "files": {name: asdict(file) for name, file in sorted(files.items())},
        }
        (self._folder / MANIFEST).write_text(json.dumps(document, indent=1), encoding="utf-8")


class SavesShards:
    """Base of a trainer that writes its part of a `ShardedSave`, one save at a time."""

    _pending: tuple[ShardedSave, BackgroundWrite] | None = None

    def _start_save(self, save: ShardedSave, asynchronous: bool) -> None:
        """Write a save, in a thread if `asynchronous`; a collective. `finish_save` must have returned True before.

        Raises:
            CheckpointError: a rank could not write; raised on every rank.
        """
        if asynchronous:
            self._pending = save, BackgroundWrite(save.write)
        else:
            save.write()
            save.finish()

    def finish_save(self, wait: bool = True) -> bool:
        """Return whether the last save is complete (True if there was none), equal on all ranks; a collective.

        Args:
            wait: wait until it is complete.

        Raises:
            CheckpointError: a rank could not write; raised on every rank.
        """
        if self._pending is None:
            return True
        save, background = self._pending
        if wait:
            background.wait()
        elif not _all_true(background.done):
            return False
        self._pending = None
        save.finish()
        return True


def open_state(folder: Path, state_format: StateFormat, check_files: Callable[[], None] = lambda: None) -> Manifest:
    """Read the manifest and check every file against it; a collective in which each rank checks some files.

    Args:
        folder: the state.
        state_format: format of the engine that reads it.
        check_files: checks the contents of the files that the engine has added.

    Raises:
        CheckpointError: there is no state of this kind, its format is newer, or it is damaged; raised on every rank.
    """
    manifest, problem = None, None
    try:
        manifest, files = _read_manifest(folder, state_format)
        mine = sorted(files.items())[rank() :: world_size()]
        for name, file in mine:
            _check_file(folder / name, file)
        check_contents(folder, files)
        check_files()
    except CheckpointError as error:
        problem = str(error)
    agree(problem)
    assert manifest is not None
    return manifest


def stored_tensors(folder: Path) -> set[str]:
    """Return the keys of a state's tensors.

    Raises:
        CheckpointError: the index cannot be read.
    """
    return set(read_index(folder).state_dict_metadata)


def check_parameters(
    folder: Path, mine: Mapping[str, tuple[int, ...]], manifest: Manifest, all_names: Collection[str]
) -> None:
    """Check that a state belongs to a model; a collective.

    Args:
        folder: the state.
        mine: whole shapes of the parameters of which this rank has a part.
        manifest: manifest of the state.
        all_names: names of the parameters of all ranks.

    Raises:
        CheckpointError: a name or a shape differs; raised on every rank.
    """
    problem = None
    for name, shape in mine.items():
        found = manifest.tensors.get(name)
        if found != shape:
            said = "does not hold it" if found is None else f"has shape {found}"
            problem = f"'{name}' has shape {shape} in the model, the state {said}"
            break
    unused = set(manifest.tensors).difference(all_names)
    if problem is None and unused:
        problem = f"the model has no '{min(unused)}', the state does"
    if problem is not None:
        problem = f"{folder / MANIFEST}: parameters of another model ({problem}); use the configuration that wrote it"
    agree(problem)


def agree(problem: str | None) -> None:
    """Raise the first problem of any rank on every rank; a collective.

    Raises:
        CheckpointError: a rank has a problem.
    """
    problems = [other for other in gathered(problem) if other]
    if problems:
        raise CheckpointError(problems[0])


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(mine: Any) -> list[Any]:
    """All-gather the values of all ranks, by rank; a collective."""
    if world_size() == 1:
        return [mine]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    return found


def cause(error: BaseException) -> str:
    """Return the error of the operating system that caused `error`, or `error` itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    return str(error).strip() or traceback.format_exception_only(error)[0].strip()


def _all_true(mine: bool) -> bool:
    """Return whether `mine` is true on every rank; a collective."""
    return all(gathered(mine))


def _on_first_rank(action: Callable[[], None]) -> list[str]:
    """Run a function on rank 0 while all ranks wait; return its error on every rank."""
    error = None
    if rank() == 0:
        try:
            action()
        except Exception as caught:
            error = f"rank 0: {cause(caught)}"
    return [other for other in gathered(error) if other]


def _measure(path: Path) -> _File:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return _File(size, crc)


def _check_file(path: Path, want: _File) -> None:
    try:
        size = path.stat().st_size
        found = _measure(path) if size == want.size else None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); choose another checkpoint") from error
    if found is None:
        raise CheckpointError(
            f"{path}: has {size} bytes, {want.size} were written; it is cut short: choose another checkpoint"
        )
    if found != want:
        raise CheckpointError(f"{path}: its checksum is not the one that was written; choose another checkpoint")


def _read_manifest(folder: Path, state_format: StateFormat) -> tuple[Manifest, dict[str, _File]]:
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        engine, number = document.get("engine", _FIRST_ENGINE), document["format"]
        if (engine, number) == (state_format.engine, state_format.number):
            tensors = {name: tuple(shape) for name, shape in document["tensors"].items()}
            manifest = Manifest(int(document["applied_steps"]), dict(document["layout"]), tensors)
            return manifest, {name: _File(**file) for name, file in document["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(_no_manifest(folder, state_format)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); choose another checkpoint") from error
    if engine != state_format.engine:
        raise CheckpointError(
            f"{path}: written by the engine {engine}, not {state_format.engine}; resume with the strategy_name that "
            "wrote it, or start from its weights (python -m roll_gspo.export, then pretrain)"
        )
    raise CheckpointError(
        f"{path}: format {number} is not known here (this version reads {state_format.number}); a newer roll_gspo "
        "wrote the checkpoint: update, or choose another checkpoint"
    )


def _no_manifest(folder: Path, state_format: StateFormat) -> str:
    for name in state_format.earlier:
        if (folder / name).is_file():
            return (
                f"{folder / name}: written by an earlier version of roll_gspo, whose state cannot be read any more; "
                "start from its actor_train_hf (pretrain: CHECKPOINT/actor_train_hf), or resume with that version"
            )
    return f"{folder / MANIFEST}: no such file; the checkpoint is of another strategy or incomplete, choose another"
