"""Running a whole training: build its components, run its steps, restart after a lost worker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from roll_gspo.checkpoint import complete_checkpoints
from roll_gspo.config.run import RunConfig
from roll_gspo.errors import WorkerError
from roll_gspo.pipelines.interrupt import graceful_interrupt
from roll_gspo.pipelines.plan import Plan
from roll_gspo.pipelines.run_folder import RunFolder, open_run_folder
from roll_gspo.pipelines.step_loop import RunComponents, Steps, run_steps
from roll_gspo.tracking.console import Console

logger = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT", bound=RunConfig)
ComponentsT = TypeVar("ComponentsT", bound=RunComponents)


def run_training(
    config: ConfigT,
    plan: Plan,
    build: Callable[[ConfigT, RunFolder, Console], ComponentsT],
    steps_of: Callable[[ConfigT, ComponentsT, Console], Steps],
    *,
    num_steps: int,
    headline: str,
) -> int:
    """Run a whole training and return the process's exit status.

    If a worker process is lost for good, the run resumes from its last checkpoint up to `max_restarts` times.

    Args:
        config: the whole configuration.
        plan: is written into the run's folder.
        build: builds the components, and loads the checkpoint to resume from.
        steps_of: makes the pipeline's steps from them.
        num_steps: training steps of the whole run, 0 if only `build` can tell.
        headline: the metric that the console draws.

    Raises:
        WorkerError: workers were lost more than `max_restarts` times.
    """
    restarts = 0
    while True:
        folder = open_run_folder(config, plan)
        try:
            return _run_once(config, folder, build, steps_of, num_steps, headline)
        except WorkerError as error:
            elsewhere = isinstance(config.resume_from_checkpoint, str) and not complete_checkpoints(folder.checkpoints)
            if restarts == config.max_restarts or elsewhere:  # its only checkpoint is that of another run
                raise type(error)(f"{error}; {_way_out(config, folder)}") from error
            restarts += 1
            logger.warning("restart %d of %d, from the last checkpoint: %s", restarts, config.max_restarts, error)
            config = config.model_copy(update={"resume_from_checkpoint": True, "run_name": folder.path.name})


def _run_once(
    config: ConfigT,
    folder: RunFolder,
    build: Callable[[ConfigT, RunFolder, Console], ComponentsT],
    steps_of: Callable[[ConfigT, ComponentsT, Console], Steps],
    num_steps: int,
    headline: str,
) -> int:
    console = Console(
        config.exp_name,
        num_steps,
        folder.path,
        headline,
        log_folder=folder.log_folder,
        logging_steps=config.logging_steps,
    )
    with console:
        components = build(config, folder, console)
        try:
            with graceful_interrupt(console.warning) as interrupt:
                return run_steps(steps_of(config, components, console), config, components, console, interrupt)
        finally:
            components.output.close()
            components.executor.close()


def _way_out(config: RunConfig, folder: RunFolder) -> str:
    again = f"run_name={folder.path.name} resume_from_checkpoint=true goes on from the last checkpoint"
    if not complete_checkpoints(folder.checkpoints):
        again = "no checkpoint was saved yet"
    if config.max_restarts:
        return f"max_restarts {config.max_restarts} is used up; {again}"
    return f"{again}; with max_restarts=1 a run does so by itself"
