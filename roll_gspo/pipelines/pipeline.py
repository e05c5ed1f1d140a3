"""Base class of pipelines: the interface that the command uses before and after importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from roll_gspo.config.base import Problem
from roll_gspo.config.pipelines import PIPELINES
from roll_gspo.config.run import RunConfig
from roll_gspo.config.sft import AnyConfig

if TYPE_CHECKING:
    from roll_gspo.pipelines.run_folder import RunFolder
    from roll_gspo.pipelines.step_loop import Steps
    from roll_gspo.tracking.console import Console

ConfigT = TypeVar("ConfigT", bound=RunConfig)


class Pipeline(Generic[ConfigT]):
    """Base class of pipelines. `pipeline: NAME` selects a subclass by a shipped name or its dotted path.

    The module of a subclass must not import torch: the plan and configuration errors need the class.

    Attributes:
        config_class: schema of the whole configuration: `ExperimentConfig`, `SftConfig`, or a subclass of one.
        headline: the metric whose history the console draws.
    """

    config_class: ClassVar[type[RunConfig]]
    headline: ClassVar[str]

    def build(self, config: ConfigT, folder: RunFolder, console: Console) -> Steps[Any, Any]:
        """Build the components of a run, load the checkpoint to resume from, and return the steps.

        Import torch and engines inside this method.

        Raises:
            DataError: a data file cannot be used.
            ConfigError: the model or the engine does not allow a setting.
        """
        raise NotImplementedError

    def max_steps(self, config: ConfigT) -> int | None:
        """Return an upper limit of the training steps, None if only the data decides. The console shows it."""
        raise NotImplementedError

    def length_text(self, config: ConfigT) -> str:
        """Return the length of a run for the plan."""
        return f"{self.max_steps(config)} steps"

    def plan_rows(self, config: ConfigT) -> Iterable[tuple[str, str]]:
        """Return the (label, text) rows of the plan between the roles and the memory."""
        return ()

    def warnings(self, config: ConfigT) -> Iterable[Problem]:
        """Return warnings of settings that run but are probably not intended."""
        return ()

    def problems(self, config: ConfigT) -> Iterable[Problem]:
        """Return valid settings that cannot run with this model."""
        return ()


def pipeline_of(config: AnyConfig) -> Pipeline[Any]:
    """Return the pipeline that the configuration selects."""
    return PIPELINES.load(config.pipeline)()


def mini_batch_text(config: AnyConfig) -> str:
    """Return size and micro-batches of an optimizer step of `actor_train`, for the plan."""
    args, budget = config.actor_train.training_args, config.actor_train.max_tokens_per_microbatch_in_train
    split = f"{args.gradient_accumulation_steps} micro-batch(es) of {args.per_device_train_batch_size}"
    if budget is not None:
        split = f"{args.mini_batch_size_per_rank} in micro-batches of up to {budget} tokens"
    return f"mini-batches of {config.mini_batch_size} ({split} × DP {config.data_parallel_size})"
