"""The run as a person sees it: a panel that updates in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from roll_gspo.printable import printable, printable_line
from roll_gspo.tracking.jsonl import read_metrics
from roll_gspo.tracking.live import VALIDATION_METRICS, RunView, Stage, duration, panel, stage_line, step_line
from roll_gspo.tracking.run_log import PROGRESS_LOGGER, run_logging
from roll_gspo.tracking.timing import StageTimer

logger = logging.getLogger(__name__)
progress_logger = logging.getLogger(PROGRESS_LOGGER)

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class Console:
    """Show, time and log what a run does; use it as a context manager around the whole run.

    On a terminal one panel updates in place and all other output appears above it. Elsewhere there is a
    line per step, a line for each finished start-up stage, and every `interval_s` a line about a stage that
    is still going on. Python logging goes to `run.log` in full.

    Args:
        name: of the run.
        num_steps: of the run, counted from 1.
        output: the run's folder.
        headline: the metric whose history is drawn.
        stream: where to write; stdout by default.
        interval_s: between two lines about a long stage where there is no terminal.
        log_folder: of `run.log`; by default `output`.
        logging_steps: steps between lines where there is no terminal; run.log has them all.
    """

    def __init__(
        self,
        name: str,
        num_steps: int,
        output: Path,
        headline: str = "rollout/score_mean",
        stream: TextIO | None = None,
        interval_s: float = 10.0,
        log_folder: Path | None = None,
        logging_steps: int = 1,
    ) -> None:
        self.timer = StageTimer()
        self._view = RunView(name, output, num_steps, headline)
        self._rich = RichConsole(file=stream)
        self._live: Live | None = None
        self._interval_s = interval_s
        self._logging_steps = logging_steps
        self._run_log = (log_folder or output) / "run.log"
        self._context = ExitStack()
        self._over = threading.Event()
        self._step_started = time.perf_counter()

    def __enter__(self) -> Console:
        self._context.enter_context(run_logging(self._run_log, self._show))
        if self._rich.is_terminal and not self._rich.is_dumb_terminal:
            self._live = Live(console=self._rich, get_renderable=self._panel, refresh_per_second=5)
            self._context.enter_context(self._live)
        else:
            thread = threading.Thread(target=self._report_long_stages, daemon=True)
            thread.start()
            self._context.callback(thread.join)
            self._context.callback(self._over.set)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        elapsed = duration(time.perf_counter() - self._view.started)
        if kind is None:
            self._view.ended = "finished"
            self._line(f"finished after {elapsed}", shown=self._live is None)
        else:
            self._view.ended = f"stopped: {kind.__name__}"
            # The caller reports the error itself; run.log keeps the traceback.
            progress_logger.error("stopped after %s", elapsed, exc_info=error)
        self._context.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Show and time (`time/<name>`) what happens inside.

        Yields:
            a function that takes (done, total) and may be called from any thread.
        """
        stage = Stage(printable_line(name), time.perf_counter())

        def progress(done: int, total: int) -> None:
            stage.done, stage.total = done, total

        self._view.stages.append(stage)
        try:
            with self.timer.stage(name):
                yield progress
        finally:
            self._view.stages.remove(stage)
        if not self._view.stepping:
            self._line(f"{stage.name}: {duration(time.perf_counter() - stage.started)}")

    def start_steps(self, first_step: int = 1, num_steps: int | None = None) -> None:
        """Start-up is over: step times count from here, and a resumed run shows what came before.

        Args:
            first_step: of this process.
            num_steps: of the run, where that was not known when the console was made.
        """
        self._view.num_steps = self._view.num_steps if num_steps is None else num_steps
        for row in read_metrics(self._view.output / "metrics.jsonl"):
            if row["step"] < first_step:
                self._remember(row["step"], {k: v for k, v in row.items() if v is not None})
        self._view.steps_done = first_step - 1
        self._view.stepping = True
        self._step_started = time.perf_counter()
        self.timer.lap()

    def timings(self) -> dict[str, float]:
        """End the step for the timer: see `StageTimer.lap`."""
        return self.timer.lap()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is finished; it took `time/step` where `metrics` has it, else the time since the last."""
        now = time.perf_counter()
        self._view.durations.append(metrics.get("time/step", now - self._step_started))
        self._step_started = now
        self._view.steps_done = step
        self._view.metrics = dict(metrics)
        self._remember(step, metrics)
        due = step % self._logging_steps == 0 or step == self._view.num_steps
        self._line(step_line(self._view), shown=due and self._live is None)

    def message(self, text: str) -> None:
        """Show `text` (above the panel) and keep it in run.log."""
        logger.info("%s", text)

    def warning(self, text: str) -> None:
        """Print a warning."""
        logger.warning("%s", text)

    def _remember(self, step: int, metrics: Mapping[str, float]) -> None:
        if math.isfinite(metrics.get(self._view.headline, math.nan)):
            self._view.history.append(metrics[self._view.headline])
        for name in VALIDATION_METRICS:
            if name in metrics:
                self._view.validation = (step, metrics[name])

    def _line(self, text: str, shown: bool = True) -> None:
        progress_logger.info("%s", text)
        if shown:
            self._show(text, logging.INFO)

    def _show(self, text: str, level: int) -> None:
        style = "bold red" if level >= logging.ERROR else "yellow" if level >= logging.WARNING else ""
        prefix = "warning: " if level == logging.WARNING else "error: " if level >= logging.ERROR else ""
        # Without a terminal nothing may be wrapped: a line is a line for grep.
        soft_wrap = self._live is None
        self._rich.print(Text(prefix + printable(text), style=style), soft_wrap=soft_wrap)
        self._rich.file.flush()

    def _panel(self) -> RenderableType:
        return panel(self._view, time.perf_counter())

    def _report_long_stages(self) -> None:
        """Say what a stage is doing that has gone on for `interval_s` without a word."""
        reported = 0.0
        while not self._over.wait(self._interval_s / 20):
            now = time.perf_counter()
            for stage in self._view.stages[-1:]:
                if now - max(stage.started, reported) >= self._interval_s:
                    reported = now
                    self._line(stage_line(self._view, stage, now))
