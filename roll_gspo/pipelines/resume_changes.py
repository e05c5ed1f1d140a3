"""Changes of the configuration since a checkpoint, and which of them a resumed run may make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.config.flatten import flatten
from roll_gspo.config.pipelines import config_class
from roll_gspo.config.run import RunConfig
from roll_gspo.config.sft import SftConfig
from roll_gspo.errors import ConfigError

CONFIG = "config.yaml"
# Keys that decide where, how long and how fast a run computes, and what it writes. All other keys decide its numbers.
# The sizes of micro-batches and layouts are among them, because the mini-batch that they make is compared instead.
FREE = (
    *("exp_name", "run_name", "output_dir", "logging_dir", "resume_from_checkpoint", "resume_with_changes"),
    *("max_steps", "num_epochs", "save_steps", "eval_steps", "logging_steps", "checkpoint_config.*"),
    *("track_with", "tracker_kwargs*", "tags", "profiler*", "log_samples_every", "trace_groups", "system_envs*"),
    *("execution", "num_gpus_per_node", "num_nodes", "*.device_mapping", "weight_transfer.*", "offload_states"),
    "gpu_memory_gb",
    *("worker_timeout_s", "max_worker_restarts", "max_restarts", "max_consecutive_skipped_steps"),
    *("*.strategy_args.strategy_config.*", "*.infer_batch_size", "*.max_tokens_per_microbatch_in_*"),
    *("*.training_args.per_device_train_batch_size", "*.training_args.gradient_accumulation_steps"),
    *("*.training_args.save_hf_model", "rewards.*.world_size", "rewards.*.start_timeout_s", "rewards.*.max_memory_mb"),
    *("validation", "validation.batch_size", "mismatch_gate*"),
)
_MISSING = object()


@dataclass(frozen=True)
class Change:
    """A key with another value than in the checkpoint.

    Attributes:
        key: dotted path of the key.
        before, after: its values as YAML; `(not set)` if one side lacks the key.
        is_free: whether the numbers of the run stay comparable.
    """

    key: str
    before: str
    after: str
    is_free: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.before} → {self.after}"


def changes_since(checkpoint: Path, config: RunConfig) -> tuple[Change, ...]:
    """Compare a configuration with the one that a checkpoint was written by.

    Raises:
        ConfigError: the checkpoint's configuration cannot be read.
    """
    path = checkpoint / CONFIG
    try:
        values = yaml.safe_load(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("no mapping of keys")
    except (OSError, ValueError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"resume_from_checkpoint: {path} cannot be read ({first}); choose another checkpoint"
        ) from error
    try:
        before = _comparable(config_class(values).model_validate(values))
    except ValueError:  # an earlier version wrote it
        before = dict(flatten(values))
        return tuple(_changes(before, {key: value for key, value in _comparable(config).items() if key in before}))
    return tuple(_changes(before, _comparable(config)))


def check_changes(changes: tuple[Change, ...], checkpoint: Path, config: RunConfig) -> None:
    """Check that the numbers of a resumed run are comparable with those before the checkpoint.

    Raises:
        ConfigError: names each key that decides numbers and has changed, unless `resume_with_changes` is true.
    """
    refused = [change for change in changes if not change.is_free]
    if refused and not config.resume_with_changes:
        raise ConfigError(
            "\n".join(
                f"{change} since {checkpoint}, so the numbers are not comparable; undo it, or set "
                "resume_with_changes=true"
                for change in refused
            )
        )


def _comparable(config: RunConfig) -> dict[str, Any]:
    """Return the keys of a valid configuration, and the numbers that several keys decide together."""
    flat = dict(flatten(config.model_dump(mode="json")))
    if isinstance(config, ExperimentConfig | SftConfig):
        flat["mini-batch of actor_train"] = config.mini_batch_size
    if isinstance(config, ExperimentConfig) and config.needs_critic:
        flat["mini-batch of critic"] = config.critic_mini_batch_size
    return flat


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    for key in [*after, *(key for key in before if key not in after)]:
        old, new = before.get(key, _MISSING), after.get(key, _MISSING)
        if old != new and key not in ("resume_from_checkpoint", "resume_with_changes"):
            free = any(fnmatchcase(key, pattern) for pattern in FREE) and ".worker_args." not in key
            free = free or _is_part_of_new_block(key, before, after)
            yield Change(key, _text(old), _text(new), free)


def _is_part_of_new_block(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether a validation was added or removed as a whole, which leaves the training as it was."""
    return key.startswith("validation.") and "validation" in {*before, *after}


def _text(value: Any) -> str:
    if value is _MISSING:
        return "(not set)"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("\n...").strip()
    return text if len(text) <= 80 else f"{text[:77]}..."
