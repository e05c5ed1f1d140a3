"""Free disk space against the size of a checkpoint, estimated before anything is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from roll_gspo.config.roles import PolicyConfig, TrainedRoleConfig
from roll_gspo.config.run import RunConfig
from roll_gspo.config.sft import AnyConfig
from roll_gspo.errors import ConfigError
from roll_gspo.models.size import adapter_parameters, size_of
from roll_gspo.pipelines.devices import model_of
from roll_gspo.pipelines.memory import BYTES_PER_PARAMETER, GIB

STATE_BYTES = 12  # per parameter: weight and two moments in float32


def checkpoint_bytes(config: AnyConfig) -> float | None:
    """Estimate the size of a checkpoint in bytes; None if the size of a model is not known yet."""
    total = 0.0
    for role in config.roles().values():
        if not isinstance(role, TrainedRoleConfig):
            continue
        size = size_of(model_of(config, role))
        if size is None:
            return None
        exports = isinstance(role, PolicyConfig) and role.training_args.save_hf_model
        exported = BYTES_PER_PARAMETER[role.model_args.dtype] if exports else 0
        lora, trained = role.model_args.lora, size.num_parameters
        if lora is not None:
            trained = adapter_parameters(model_of(config, role), lora.rank, lora.target_modules) or 0
        total += trained * STATE_BYTES + size.num_parameters * exported
    return total


def check_disk(config: AnyConfig) -> None:
    """Check that the first checkpoint fits on the disk.

    Raises:
        ConfigError: it does not.
    """
    for text in _shortages(config, num_checkpoints=1):
        raise ConfigError(f"{text}; free space, or choose another folder")


def disk_warnings(config: AnyConfig) -> list[str]:
    """Warn if only one checkpoint fits: the previous one is deleted after the next is complete."""
    return [
        f"{text}: a second one does not fit, and the previous is deleted only after the next is complete"
        for text in _shortages(config, num_checkpoints=2)
        if not list(_shortages(config, num_checkpoints=1))
    ]


def _shortages(config: AnyConfig, num_checkpoints: int) -> Iterator[str]:
    needed, (key, folder) = checkpoint_bytes(config), checkpoints_folder(config)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed is not None and free < num_checkpoints * needed:
        yield f"{key}: a checkpoint takes about {needed / GIB:.3g} GiB, and {folder} has {free / GIB:.3g} GiB free"


def checkpoints_folder(config: RunConfig) -> tuple[str, Path]:
    """Return the folder below which checkpoints are written, and the key that names it."""
    if config.checkpoint_config.output_dir is not None:
        return "checkpoint_config.output_dir", Path(config.checkpoint_config.output_dir).absolute()
    return "output_dir", Path(config.output_dir).absolute()
