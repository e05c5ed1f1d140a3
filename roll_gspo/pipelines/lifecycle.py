"""Running a whole training: build its components, run its steps, restart after a lost worker."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from roll_gspo.checkpoint import complete_checkpoints
from roll_gspo.config.run import RunConfig
from roll_gspo.errors import WorkerError
from roll_gspo.pipelines.interrupt import graceful_interrupt
from roll_gspo.pipelines.pipeline import ConfigT, Pipeline
from roll_gspo.pipelines.run_folder import RunFolder, open_run_folder
from roll_gspo.pipelines.step_loop import Callback, run_steps
from roll_gspo.tracking.console import Console

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A training that ended in order.

    Attributes:
        folder: the folders of the run.
        status: exit status for the process: 0, 1 if a step stopped the run, or 128 + the signal that stopped it.
        stopped: True if the run ended before its last step.
    """

    folder: RunFolder
    status: int
    stopped: bool


def run_training(
    pipeline: Pipeline[ConfigT], config: ConfigT, plan_text: str, callbacks: Sequence[Callback] = ()
) -> Finished:
    """Run a whole training.

    If a worker process is lost for good, the run resumes from its last checkpoint up to `max_restarts` times.

    Args:
        pipeline: builds and trains.
        config: the whole configuration.
        plan_text: text of the plan, written into the run's folder.
        callbacks: functions that are called after every step.

    Raises:
        WorkerError: workers were lost more than `max_restarts` times.
    """
    restarts = 0
    while True:
        folder = open_run_folder(config, plan_text)
        try:
            return _run_once(pipeline, config, folder, callbacks)
        except WorkerError as error:
            elsewhere = isinstance(config.resume_from_checkpoint, str) and not complete_checkpoints(folder.checkpoints)
            if restarts == config.max_restarts or elsewhere:  # the only checkpoint belongs to another run
                raise type(error)(f"{error}; {_way_out(config, folder)}") from error
            restarts += 1
            logger.warning("restart %d of %d, from the last checkpoint: %s", restarts, config.max_restarts, error)
            config = config.model_copy(update={"resume_from_checkpoint": True, "run_name": folder.path.name})
        finally:
            folder.unlock()


def _run_once(
    pipeline: Pipeline[ConfigT], config: ConfigT, folder: RunFolder, callbacks: Sequence[Callback]
) -> Finished:
    console = Console(
        config.exp_name,
        pipeline.max_steps(config) or 0,
        folder.path,
        pipeline.headline,
        log_folder=folder.log_folder,
        logging_steps=config.logging_steps,
    )
    with console:
        steps = pipeline.build(config, folder, console)
        try:
            with graceful_interrupt(console.warning) as interrupt:
                status = run_steps(steps, interrupt, callbacks)
            return Finished(folder, status, steps.components.state.step < steps.components.num_steps)
        finally:
            steps.components.output.close()
            steps.components.executor.close()


def _way_out(config: RunConfig, folder: RunFolder) -> str:
    again = f"run_name={folder.path.name} resume_from_checkpoint=true resumes from the last checkpoint"
    if not complete_checkpoints(folder.checkpoints):
        again = "no checkpoint was saved yet"
    if config.max_restarts:
        return f"max_restarts {config.max_restarts} is used up; {again}"
    return f"{again}; with max_restarts=1 a run resumes by itself"
