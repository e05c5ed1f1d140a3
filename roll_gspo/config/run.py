"""Top-level keys of the run, common to all pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from roll_gspo.config.base import FolderName, Names, Problem, Schema, used_only_with
from roll_gspo.config.data import Template
from roll_gspo.config.pipelines import PipelineName
from roll_gspo.config.profiler import ProfilerConfig
from roll_gspo.config.roles import BuiltinTask, CheckpointConfig, WarmStart, WeightTransferConfig
from roll_gspo.config.trackers import TrackerNames, broken_tracker_rules, tracker_options


class RunConfig(Schema):
    """The run itself: name, length, output, tracking, state."""

    exp_name: FolderName = "roll_gspo"
    """Name of the experiment; its runs are in `output_dir/exp_name`."""
    run_name: FolderName | None = None
    """Folder of this run below `output_dir/exp_name`; null: date and time."""
    seed: NonNegativeInt = 42
    """Seed of data order, sampling and initialisation."""
    pipeline: PipelineName = "rlvr"
    """Training loop: `rlvr` (reinforcement learning), `sft` (supervised fine-tuning, with different keys), or the
    dotted path of your pipeline."""
    execution: Literal["local", "ray"] = "local"
    """`local` runs all roles in this process, `ray` in worker processes."""
    worker_timeout_s: PositiveFloat = 1800.0
    """Time limit in seconds of one call of a Ray worker, e.g. a whole update; a worker that exceeds it is killed."""
    max_worker_restarts: NonNegativeInt = 3
    """Maximum restarts of generation workers in one run."""
    max_restarts: NonNegativeInt = 0
    """Maximum automatic restarts of a run from its last checkpoint after it lost a trainer or another worker."""
    pretrain: str
    """Hugging Face name or folder of the model to start from, or `builtin:NAME` (generated)."""
    global_template: Template | None = None
    """Chat template of all data; has precedence over `data_args.template`."""
    tag_to_template: dict[str, Template] = Field(default_factory=dict)
    """Chat templates by tag of the row; have precedence over all others."""
    warm_start: WarmStart | None = None
    """Supervised start of a `builtin:` model. The one of the group `model` is dropped if you set another `pretrain`."""
    save_steps: PositiveInt = 50
    """Steps between checkpoints; the last step is always saved."""
    eval_steps: PositiveInt = 10
    """Steps between validations."""
    logging_steps: PositiveInt = 1
    """Steps between lines if the console is not a terminal."""
    output_dir: str = "./output"
    """Folder of all experiments."""
    logging_dir: str | None = None
    """Folder of `run.log`; null: the run's folder."""
    resume_from_checkpoint: bool | str = False
    """`true` resumes from the newest complete checkpoint of `exp_name`; a path resumes from that checkpoint."""
    resume_with_changes: bool = False
    """Resume although keys that decide the numbers have changed since the checkpoint, e.g. the algorithm or the data.
    Without it, such a run is refused. Keys of output, length, speed and layout may always change."""
    checkpoint_config: CheckpointConfig = CheckpointConfig()
    """Checkpoint settings."""
    track_with: TrackerNames = ("tensorboard",)
    """Trackers beside `metrics.jsonl`, which is always written: any of `tensorboard`, `wandb`, `mlflow`, `swanlab`,
    `trackio`, `stdout`, the dotted path of your own, or `none`. `docs/tracking.md` describes them."""
    tracker_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of each tracker by its name (`wandb: {project: p}`), or those of the only tracker."""
    tags: Names = ()
    """Labels of the run in trackers."""
    profiler: ProfilerConfig | None = None
    """Steps to profile; traces go to `profile/` of the run."""
    system_envs: dict[str, str] = Field(default_factory=dict)
    """Environment variables, set before engines are imported."""
    num_gpus_per_node: NonNegativeInt = 8
    """Devices per machine; device `d` is on machine `d // num_gpus_per_node`."""
    gpu_memory_gb: PositiveFloat | None = None
    """Memory of each GPU in GiB, for the memory plan; null: that of this machine's GPUs, or 80 if there are none."""
    num_nodes: PositiveInt | None = None
    """Number of machines; null: as many as the device mappings need."""
    offload_states: bool | None = None
    """Let roles that share devices take turns: while one works, the state of the others is in host memory, and vLLM
    sleeps. null: true on GPUs. `false` keeps all of them in device memory together. Roles share devices if their
    `device_mapping` overlaps, or with `execution: local`."""
    weight_transfer: WeightTransferConfig = WeightTransferConfig()
    """Transfer of new weights from the trainer to the engines."""

    @property
    def tracker_options(self) -> dict[str, dict[str, Any]]:
        """Options of each tracker of `track_with`."""
        return tracker_options(self.track_with, self.tracker_kwargs)

    @classmethod
    def fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fill in the task of the warm start with the builtin task of the training data."""
        values = super().fill_defaults(values)
        warm_start, task = values.get("warm_start"), _builtin_task(values)
        if isinstance(warm_start, dict) and "demonstrations" not in warm_start and task is not None:
            values["warm_start"] = warm_start | {"demonstrations": task}
        return values

    def broken_rules(self) -> Iterator[Problem]:
        """Yield what is wrong with the trackers and the warm start."""
        yield from super().broken_rules()
        yield from broken_tracker_rules(self.track_with, self.tracker_kwargs)
        if self.resume_with_changes and not self.resume_from_checkpoint:
            yield used_only_with("resume_with_changes", "resume_from_checkpoint")
        if self.warm_start and not self.pretrain.startswith("builtin:"):
            message = f"is for builtin: models, and pretrain is '{self.pretrain}'; set warm_start: null"
            yield Problem("warm_start", message, ("pretrain",))


def _builtin_task(values: Any) -> str | None:
    """Return the builtin task that the training data are, or None."""
    for key in ("actor_train", "data_args", "file_name"):
        values = values.get(key) if isinstance(values, dict) else None
    name = values[0] if isinstance(values, list | tuple) and values else values
    return name if isinstance(name, str) and name in get_args(BuiltinTask) else None
