"""Keys of the run itself, which every pipeline has, flat at the top level of the YAML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from roll_gspo.config.base import Problem, Schema
from roll_gspo.config.data import Template
from roll_gspo.config.roles import CheckpointConfig, TrackerKwargs, WarmStart, WeightTransferConfig


class RunConfig(Schema):
    """The run itself: name, length, output, tracking, state."""

    exp_name: str = "roll_gspo"
    """Name of the experiment: its runs lie in `output_dir/exp_name`."""
    run_name: str | None = None
    """Folder of this run below `output_dir/exp_name`; null: date and time."""
    seed: NonNegativeInt = 42
    """Of data order, sampling and initialisation."""
    pipeline: Literal["rlvr", "sft"] = "rlvr"
    """Which training loop: reinforcement learning, or supervised fine-tuning (which has keys of its own, below)."""
    execution: Literal["local", "ray"] = "local"
    """Where roles live: in this process, or as Ray actors."""
    worker_timeout_s: PositiveFloat = 1800.0
    """Seconds that one call of a Ray worker may take (a whole update, a share of the generation) before it is hung."""
    max_worker_restarts: NonNegativeInt = 3
    """Generation workers that may be lost and started again in one run."""
    max_restarts: NonNegativeInt = 0
    """Times that a run whose trainer or other worker was lost goes on from its last checkpoint by itself."""
    pretrain: str
    """Hugging Face name or folder of the model to start from, or `builtin:NAME` (made on the spot)."""
    global_template: Template | None = None
    """Chat template of all data, instead of `data_args.template`."""
    tag_to_template: dict[str, Template] = Field(default_factory=dict)
    """Chat templates of the rows with a tag, instead of every other."""
    warm_start: WarmStart | None = None
    """Supervised start of a `builtin:` model."""
    save_steps: PositiveInt = 50
    """Steps between checkpoints; the last step is always saved."""
    eval_steps: PositiveInt = 10
    """Steps between validations."""
    logging_steps: PositiveInt = 1
    """Steps between lines on a console that is not a terminal."""
    output_dir: str = "./output"
    """Folder of all experiments."""
    logging_dir: str | None = None
    """Folder of `run.log`; null: the run's folder."""
    resume_from_checkpoint: bool | str = False
    """`true`: go on from the newest complete checkpoint of `exp_name`; or the path of one."""
    checkpoint_config: CheckpointConfig = CheckpointConfig()
    """How checkpoints are kept."""
    track_with: Literal["tensorboard", "stdout", "none"] = "tensorboard"
    """Tracker beside `metrics.jsonl`, which is always written."""
    tracker_kwargs: TrackerKwargs = TrackerKwargs()
    """Options of the tracker."""
    system_envs: dict[str, str] = Field(default_factory=dict)
    """Environment variables, set before any engine is imported."""
    num_gpus_per_node: NonNegativeInt = 8
    """Devices of one machine; device numbers beyond it are on the next machine."""
    num_nodes: PositiveInt | None = None
    """Machines; null: as many as the device mappings reach."""
    weight_transfer: WeightTransferConfig = WeightTransferConfig()
    """How new weights travel from the trainer to the engines."""

    def broken_rules(self) -> Iterator[Problem]:
        """Only builtin models are made ready."""
        yield from super().broken_rules()
        if self.warm_start and not self.pretrain.startswith("builtin:"):
            message = f"is for builtin: models, and pretrain is '{self.pretrain}'; set warm_start: null"
            yield Problem("warm_start", message, ("pretrain",))
