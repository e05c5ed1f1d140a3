"""The files of megatron's training state, in the `dist_checkpointing` format (backend `torch_dist`).

`roll_gspo.strategies.sharded_state` writes and checks them. megatron's tools can read them: `metadata.json` has
megatron's name and version of the format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint.api import CheckpointException

from roll_gspo.errors import CheckpointError
from roll_gspo.strategies.restricted_load import unreadable
from roll_gspo.strategies.sharded_state import Manifest, ShardedSave, StateFormat, cause, open_state, rank
from roll_gspo.strategies.untrusted_state import check_tensor_files

_FORMAT = StateFormat("megatron", 2, ("rank_000.pt",))  # 1 was a plain file per rank
_BACKEND = "metadata.json"


def begin_sharded_save(folder: Path, tensors: Sequence[ShardedTensor], common: Any, manifest: Manifest) -> ShardedSave:
    """Plan a save into an empty folder; a collective.

    Args:
        folder: the folder.
        tensors: pieces of this rank, read until `write` has returned. A piece of several ranks has `replica_id` 0 on
            one of them.
        common: plain values and CPU tensors of rank 0.
        manifest: manifest of rank 0.
    """
    pieces: dict[str, list[Any]] = {}
    for tensor in tensors:
        if tensor.replica_id == 0:
            pieces.setdefault(tensor.key, []).append(tensor)
    planner = MCoreSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(pieces), is_coordinator=rank() == 0)

    def add_files() -> Sequence[str]:
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        return [_BACKEND]

    return ShardedSave(folder, planner, common, _FORMAT, manifest, add_files)


def open_megatron_state(folder: Path) -> Manifest:
    """Read the manifest and check every file; a collective.

    Raises:
        CheckpointError: there is no state of megatron, its format is newer, or it is damaged; raised on every rank.
    """
    return open_state(folder, _FORMAT, lambda: _check_backend(folder))


def _check_backend(folder: Path) -> None:
    """Check that megatron will read the files with the expected reader."""
    try:
        backend = json.loads((folder / _BACKEND).read_text(encoding="utf-8"))["sharded_backend"]
        if backend != "torch_dist":
            raise ValueError(f"sharded_backend is {backend!r}, not 'torch_dist'")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(folder / _BACKEND, error) from error


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
        raise CheckpointError(f"{folder}: cannot be read ({cause(error)}); choose another checkpoint") from error
    return {name: value for name, value in loaded.items() if name not in pieces}
