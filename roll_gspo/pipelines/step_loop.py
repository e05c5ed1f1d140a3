"""The loop over training steps that all pipelines share: train, validate, log, save, stop on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from roll_gspo.config.experiment import RunConfig
from roll_gspo.pipelines.components import RunComponents
from roll_gspo.pipelines.interrupt import Interrupt
from roll_gspo.pipelines.output import Output
from roll_gspo.pipelines.run_folder import nothing_left
from roll_gspo.tracking.console import Console
from roll_gspo.tracking.memory import rss_mb

ConfigT = TypeVar("ConfigT", bound=RunConfig)
ComponentsT = TypeVar("ComponentsT", bound=RunComponents)
# Called with a step and its metrics after the step is logged. True stops the run as Ctrl-C does: it saves and ends.
Callback = Callable[[int, Mapping[str, float]], bool | None]
STOPPED = 1  # exit status of a run that a step stopped
SIGNALLED = 128  # shell exit status is this plus the signal number: 130 after Ctrl-C


class Steps(Generic[ConfigT, ComponentsT]):
    """The stages of a pipeline inside the loop of `run_steps`. Subclasses implement `train_step`.

    Args:
        config: the whole configuration.
        components: components of the run; `run_steps` uses the fields of `RunComponents`.
        console: the live view; it times the stages of a step.

    Attributes:
        stop_reason: set by a step to save and end the run with exit status 1; a sentence without its full stop.
    """

    stop_reason: str | None = None

    def __init__(self, config: ConfigT, components: ComponentsT, console: Console) -> None:
        self.config = config
        self.components = components
        self.console = console

    def train_step(self, step: int) -> dict[str, float]:
        """Take one training step and return its metrics."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Prepare for the first step of this process. Does nothing unless overridden."""

    def before_save(self, role: str) -> None:
        """Bring the state of a trained role onto its devices. Does nothing unless overridden."""

    def validate(self, step: int) -> dict[str, float]:
        """Return validation metrics of the current model. Empty unless overridden."""
        return {}

    def throughput(self, metrics: Mapping[str, float], times: Mapping[str, float]) -> dict[str, float]:
        """Return rates of the step, such as tokens per second. Empty unless overridden.

        Args:
            metrics: the step's metrics.
            times: seconds by stage, `time/<stage>`.
        """
        return {}

    def finish(self, step: int) -> None:
        """Report on a model that was trained up to `step` in this process. Does nothing unless overridden."""


def run_steps(steps: Steps[Any, Any], interrupt: Interrupt, callbacks: Sequence[Callback] = ()) -> int:
    """Train until the last step or until the user interrupts, and return the process's exit status.

    Validation runs before the first step, every `eval_steps` and after the last step. A checkpoint follows every
    `save_steps`, a best validation, the last step, and the step that was interrupted.

    Args:
        steps: the pipeline.
        interrupt: request of the user to stop.
        callbacks: functions that are called after every step; one that returns True stops the run.
    """
    config: RunConfig = steps.config
    components: RunComponents = steps.components
    state, output, num_steps = components.state, components.output, components.num_steps
    keep, console = config.checkpoint_config, steps.console
    first_step = state.step + 1
    if state.step >= num_steps:
        console.warning(nothing_left(state.step, num_steps))
    steps.prepare()
    if state.step == 0:
        output.before_training(steps.validate(0))
    console.start_steps(first_step, num_steps)
    stopping = interrupt.requested
    while state.step < num_steps and not stopping:
        step = state.step + 1
        with components.profiler.step(step):
            metrics = steps.train_step(step)
        state.step = step
        is_last, is_best = step == num_steps, False
        if is_last or step % config.eval_steps == 0:
            validation = steps.validate(step)
            metrics |= validation
            is_best = state.update_best(keep.keep_best, keep.keep_best_mode, validation)
        times = console.timings()
        costs = {**times, **steps.throughput(metrics, times), "memory/rss_mb": rss_mb()}
        # Log before saving: if the run is killed in between, it resumes from the previous checkpoint and logs the
        # step again.
        output.log(step, metrics | costs)
        requests = [callback(step, metrics | costs) for callback in callbacks]
        # Read once, so that a run that stops has saved.
        stopping = any(requests) or interrupt.requested or steps.stop_reason is not None
        if is_last or stopping or is_best or step % config.save_steps == 0:
            with console.stage("save"):
                output.save(step, state, components.trained_roles, components.actor_train, steps.before_save)
        else:
            output.finish_save(wait=False)
    with console.stage("save"):
        output.finish_save()
    if state.step >= first_step:
        steps.finish(state.step)
    status = _finish(output, console, interrupt, first_step, state.step, num_steps)
    if steps.stop_reason is None:
        return status
    console.warning(f"{steps.stop_reason}; the run was stopped")
    return status or STOPPED


def _finish(output: Output, console: Console, interrupt: Interrupt, first_step: int, step: int, num_steps: int) -> int:
    """Write the report, close the trackers, print how the run ended, and return the exit status.

    Args:
        output, console, interrupt: components of the run.
        first_step: the first step of this process.
        step: the last completed step.
        num_steps: number of steps of the whole run.
    """
    with console.stage("report"):
        report = output.report()
    with console.stage("close trackers"):
        output.finish(report)
    if report is not None:
        console.message(f"report: {report}")
    if step == num_steps:
        return 0
    if step < first_step:
        console.message("stopped before the first step was complete; nothing was saved")
    else:
        console.message(
            f"stopped after step {step} of {num_steps} and saved; resume with the same command and "
            "resume_from_checkpoint=true"
        )
    return 0 if interrupt.signal is None else SIGNALLED + interrupt.signal
