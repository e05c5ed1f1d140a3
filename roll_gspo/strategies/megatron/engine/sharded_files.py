"""The files of a state that many ranks write together and any number of ranks read.

The format is megatron's `dist_checkpointing` (backend `torch_dist`), so that its tools can read it:

    __0_0.distcp, __1_0.distcp, ...   tensors that each rank wrote
    .metadata                         location of each piece of each tensor
    common.pt                         values other than tensors of the model
    metadata.json                     megatron's name and version of the format
    manifest.json                     this package's format number, layout, and size and checksum per file; written last

megatron's own writer starts processes for every save. This one writes in the process, also from a thread. No rank waits
for another between its plan and `finish`. An error of one rank becomes the error of all.
"""

from __future__ import annotations

import json
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.storage import WriteResult

from roll_gspo.errors import CheckpointError
from roll_gspo.strategies.megatron.engine.untrusted import check_contents, check_tensor_files, read_index

FORMAT = 2  # increase it if older code cannot read the new files; 1 was a plain file per rank
MANIFEST = "manifest.json"
_EARLIER = "rank_000.pt"
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Parallel layout of the ranks that wrote a state."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int | None
    context: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class Manifest:
    """Description of a state, read before its tensors.

    Attributes:
        applied_steps: number of optimizer steps of the state.
        layout: layout of the ranks that wrote it; not needed to read it.
        tensors: whole shapes by name.
    """

    applied_steps: int
    layout: Layout
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
        tensors: pieces of this rank, read until `write` has returned. A piece of several ranks has `replica_id` 0 on
            one of them.
        common: plain values and CPU tensors of rank 0 that every reader can rely on.
        manifest: manifest of rank 0.
    """

    def __init__(self, folder: Path, tensors: Sequence[ShardedTensor], common: Any, manifest: Manifest) -> None:
        self._folder, self._common, self._manifest = folder, common, manifest
        pieces: dict[str, list[Any]] = {}
        for tensor in tensors:
            if tensor.replica_id == 0:
                pieces.setdefault(tensor.key, []).append(tensor)
        self._writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
        self._planner = MCoreSavePlanner(flatten_state_dict=False)
        rank, is_first = dist.get_rank(), dist.get_rank() == 0
        self._planner.set_up_planner(mcore_to_pyt_state_dict(pieces), is_coordinator=is_first)
        self._writer.set_up_storage_writer(is_first)
        plans = _of_all(self._planner.create_local_plan())
        plans, self._metadata = self._planner.create_global_plan(plans)
        plan = self._writer.prepare_global_plan(plans)[rank]
        self._plan = self._planner.finish_plan(plan)
        self._part = _Part()

    def write(self) -> None:
        """Write this rank's file without communication. An error is kept for `finish`."""
        try:
            results = self._writer.write_data(self._plan, self._planner).value() if self._plan.items else []
            names = {result.storage_data.relative_path for result in results}
            self._part = _Part(results, {name: _measure(self._folder / name) for name in names})
        except Exception as error:  # torch reports a full disk by other exception types
            self._part = _Part(error=_cause(error))

    def finish(self) -> None:
        """Make the folder readable after every rank has written; a collective.

        Raises:
            CheckpointError: a rank could not write; raised on every rank.
        """
        parts = _of_all(self._part)
        errors = [f"rank {rank}: {part.error}" for rank, part in enumerate(parts) if part.error]
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
        torch.save(self._common, self._folder / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        files = {name: file for part in parts for name, file in (part.files or {}).items()}
        for name in (".metadata", COMMON_STATE_FNAME, "metadata.json"):
            files[name] = _measure(self._folder / name)
        document = {
            "format": FORMAT,
            **asdict(self._manifest),
            "files": {name: asdict(file) for name, file in sorted(files.items())},
        }
        (self._folder / MANIFEST).write_text(json.dumps(document, indent=1), encoding="utf-8")


def open_state(folder: Path) -> Manifest:
    """Read the manifest and check every file against it; a collective in which each rank checks some files.

    Raises:
        CheckpointError: there is no state of this kind, its format is newer, or it is damaged; raised on every rank.
    """
    manifest, problem = None, None
    try:
        manifest, files = _read_manifest(folder)
        mine = sorted(files.items())[dist.get_rank() :: dist.get_world_size()]
        for name, file in mine:
            _check_file(folder / name, file)
        check_contents(folder, files)
    except CheckpointError as error:
        problem = str(error)
    agree(problem)
    assert manifest is not None
    return manifest


def read_tensors(folder: Path, tensors: Sequence[ShardedTensor]) -> Any:
    """Fill the data of pieces from a state that was split in any way; a collective.

    Returns:
        The `common` values of the state.

    Raises:
        CheckpointError: a tensor is not in the state.
    """
    try:
        pieces = {f"{number}": tensor for number, tensor in enumerate(tensors)}
        loaded: Any = dist_checkpointing.load(pieces, str(folder), validate_access_integrity=False)
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        check_tensor_files(folder)
        raise CheckpointError(f"{folder}: cannot be read ({_cause(error)}); choose another checkpoint") from error
    return {name: value for name, value in loaded.items() if name not in pieces}


def stored_tensors(folder: Path) -> set[str]:
    """Return the keys of a state's tensors.

    Raises:
        CheckpointError: the index cannot be read.
    """
    return set(read_index(folder).state_dict_metadata)


def agree(problem: str | None) -> None:
    """Raise the first problem of any rank on every rank; a collective.

    Raises:
        CheckpointError: a rank has a problem.
    """
    problems = [other for other in _of_all(problem) if other]
    if problems:
        raise CheckpointError(problems[0])


def all_true(mine: bool) -> bool:
    """Return whether `value` is true on every rank; a collective."""
    return all(_of_all(mine))


def _of_all(mine: Any) -> list[Any]:
    """All-gather the values of all ranks, by rank."""
    if dist.get_world_size() == 1:
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _on_first_rank(action: Callable[[], None]) -> list[str]:
    """Run a function on rank 0 while all ranks wait; raise its error on every rank."""
    error = None
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as caught:
            error = f"rank 0: {_cause(caught)}"
    return [other for other in _of_all(error) if other]


def _cause(error: BaseException) -> str:
    """Return the error of the operating system that caused `error`, or `error` itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    return str(error).strip() or traceback.format_exception_only(error)[0].strip()


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


def _read_manifest(folder: Path) -> tuple[Manifest, dict[str, _File]]:
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        number = document["format"]
        if number == FORMAT:
            tensors = {name: tuple(shape) for name, shape in document["tensors"].items()}
            manifest = Manifest(document["applied_steps"], Layout(**document["layout"]), tensors)
            return manifest, {name: _File(**file) for name, file in document["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(_no_manifest(folder)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); choose another checkpoint") from error
    raise CheckpointError(
        f"{path}: format {number} is not known here (this version reads {FORMAT}); a newer roll_gspo wrote the "
        "checkpoint: update, or choose another checkpoint"
    )


def _no_manifest(folder: Path) -> str:
    if (folder / _EARLIER).is_file():
        return (
            f"{folder / _EARLIER}: written by an earlier version of roll_gspo, whose state cannot be read any more; "
            "start from its actor_train_hf (pretrain: CHECKPOINT/actor_train_hf), or resume with that version"
        )
    return f"{folder / MANIFEST}: no such file; the checkpoint is of another strategy or incomplete, choose another"
