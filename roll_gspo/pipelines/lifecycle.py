"""How any training begins, begins again where a worker was lost, and ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from roll_gspo.checkpoint import complete_checkpoints
from roll_gspo.config.experiment import RunConfig
from roll_gspo.errors import WorkerError
from roll_gspo.pipelines.interrupt import Interrupt
from roll_gspo.pipelines.output import Output
from roll_gspo.pipelines.plan import Plan
from roll_gspo.pipelines.run_folder import RunFolder, open_run_folder
from roll_gspo.tracking.console import Console

logger = logging.getLogger(__name__)
SIGNALLED = 128  # plus the signal's number is a shell's exit status: 130 after Ctrl-C
ConfigT = TypeVar("ConfigT", bound=RunConfig)


def run_with_restarts(config: ConfigT, plan: Plan, run_once: Callable[[ConfigT, RunFolder], int]) -> int:
    """Run the whole training; returns the process's exit status.

    Where a worker process is lost for good, the run goes on from its last checkpoint up to `max_restarts` times.

    Raises:
        WorkerError: a worker was lost more often than that.
    """
    restarts = 0
    while True:
        folder = open_run_folder(config, plan)
        try:
            return run_once(config, folder)
        except WorkerError as error:
            elsewhere = isinstance(config.resume_from_checkpoint, str) and not complete_checkpoints(folder.checkpoints)
            if restarts == config.max_restarts or elsewhere:  # its only checkpoint is that of another run
                raise type(error)(f"{error}; {_way_out(config, folder)}") from error
            restarts += 1
            logger.warning("restart %d of %d, from the last checkpoint: %s", restarts, config.max_restarts, error)
            config = config.model_copy(update={"resume_from_checkpoint": True, "run_name": folder.path.name})


def _way_out(config: RunConfig, folder: RunFolder) -> str:
    again = f"run_name={folder.path.name} resume_from_checkpoint=true goes on from the last checkpoint"
    if not complete_checkpoints(folder.checkpoints):
        again = "no checkpoint was saved yet"
    if config.max_restarts:
        return f"max_restarts {config.max_restarts} is used up; {again}"
    return f"{again}; with max_restarts=1 a run does so by itself"


def open_console(config: RunConfig, folder: RunFolder, num_steps: int, headline: str = "rollout/score_mean") -> Console:
    """The live view of a run of `num_steps` (0: not known yet), of which the metric `headline` is drawn."""
    return Console(
        config.exp_name,
        num_steps,
        folder.path,
        headline,
        log_folder=folder.log_folder,
        logging_steps=config.logging_steps,
    )


def finish(output: Output, console: Console, interrupt: Interrupt, first_step: int, step: int, num_steps: int) -> int:
    """Close the trackers, write the report and say how the run ended; returns the process's exit status.

    Args:
        output, console, interrupt: of the run.
        first_step: of this process.
        step: the last one that was done.
        num_steps: of the whole run.
    """
    output.close()
    with console.stage("report"):
        report = output.report()
    if report is not None:
        console.message(f"report: {report}")
    if interrupt.signal is None or step == num_steps:
        return 0
    if step < first_step:
        console.message("stopped before a step was done; nothing was saved")
    else:
        console.message(
            f"stopped after step {step} of {num_steps} and saved; the same command with "
            "resume_from_checkpoint=true goes on"
        )
    return SIGNALLED + interrupt.signal
