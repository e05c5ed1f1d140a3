"""State of a run for the console, drawn as a terminal panel or as log lines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from roll_gspo.printable import printable_line

ETA_STEPS = 10
SPARKLINE_WIDTH = 32
_BLOCKS = "▁▂▃▄▅▆▇█"

# (label, metric, format): what a step is summed up as, where the metric is there.
FIGURES = (
    ("clip", "actor/clip_fraction", "{:.4f}"),
    ("length", "rollout/response_length_mean", "{:.0f}"),
    ("KL", "actor/approx_kl", "{:.1e}"),
    ("entropy", "actor/entropy", "{:.3f}"),
    ("tokens/s", "rollout/tokens_per_s", "{:,.0f}"),
    ("tokens/s", "sft/tokens_per_s", "{:,.0f}"),
)
VALIDATION_METRICS = ("validation/score_mean", "validation/loss")


@dataclass
class Stage:
    """A running stage; `total` is 0 if it reports no progress."""

    name: str
    started: float
    done: int = 0
    total: int = 0


@dataclass
class RunView:
    """The displayed state of a run, updated by the console and drawn by the functions below.

    Attributes:
        name, output, num_steps: name, folder and number of steps of the run.
        headline: the metric whose history is drawn.
        steps_done: finished steps, including those before a resume.
        stepping: False during start-up.
        stages: open stages, innermost last.
        metrics: metrics of the last finished step.
        history: the headline metric of every finished step.
        validation: (step, score) of the newest validation.
        durations: seconds of the latest steps of this process.
        ended: how the run ended; empty while it continues.
    """

    name: str
    output: Path
    num_steps: int
    headline: str
    started: float = field(default_factory=time.perf_counter)
    steps_done: int = 0
    stepping: bool = False
    stages: list[Stage] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: list[float] = field(default_factory=list)
    validation: tuple[int, float] | None = None
    durations: list[float] = field(default_factory=list)
    ended: str = ""

    @property
    def headline_label(self) -> str:
        """Name of the headline metric in a log line."""
        return "loss" if self.headline.endswith("loss") else "reward"

    @property
    def eta_s(self) -> float | None:
        """Return the remaining seconds at the pace of the latest steps; None before the first step."""
        if not self.durations:
            return None
        latest = self.durations[-ETA_STEPS:]
        return (self.num_steps - self.steps_done) * sum(latest) / len(latest)


def duration(seconds: float) -> str:
    """Return e.g. `8.2 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def sparkline(values: Sequence[float], width: int = SPARKLINE_WIDTH) -> str:
    """Return `values` as at most `width` blocks, each a mean of neighbours; NaN is ignored."""
    finite = [v for v in values if abs(v) < float("inf")]
    if len(finite) > width:
        edges = [round(i * len(finite) / width) for i in range(width + 1)]
        finite = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] for v in finite)


def step_line(view: RunView) -> str:
    """Return one finished step as a line."""
    parts = [f"step {view.steps_done}/{view.num_steps}"]
    shown = ((view.headline_label, view.headline, "{:.4f}"), *FIGURES)
    parts += [f"{label} {form.format(view.metrics[m])}" for label, m, form in shown if m in view.metrics]
    if view.validation and view.validation[0] == view.steps_done:
        parts.append(f"validation {view.validation[1]:.4f}")
    if view.durations:
        parts.append(duration(view.durations[-1]))
    if view.eta_s:
        parts.append(f"{duration(view.eta_s)} left")
    return "  ".join(parts)


def stage_line(view: RunView, stage: Stage, now: float) -> str:
    """Add the current stage, its progress and its duration."""
    where = f"step {view.steps_done + 1}/{view.num_steps}" if view.stepping else "start"
    if view.stepping and view.steps_done >= view.num_steps:
        where = "end"
    progress = f"  {stage.done}/{stage.total}" if stage.total else ""
    return f"{where}  {stage.name}{progress}  {duration(now - stage.started)}"


def panel(view: RunView, now: float) -> RenderableType:
    """Return the live view of a terminal."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    _add_steps(grid, view, now)
    _add_stage(grid, view, now)
    if view.history:
        _add_headline(grid, view)
    parts: list[RenderableType] = [grid]
    figures = [
        f"[dim]{label}[/] {form.format(view.metrics[metric])}"
        for label, metric, form in FIGURES
        if metric in view.metrics
    ]
    if view.durations:
        figures.append(f"[dim]step[/] {duration(view.durations[-1])}")
    if figures:
        parts.append(Text.from_markup("   ".join(figures)))
    title = f"[bold]{_markup(view.name)}[/] [dim]→ {_markup(str(view.output))}[/]"
    border = "red" if view.ended and view.ended != "finished" else "cyan"
    return Panel(Group(*parts), title=title, title_align="left", border_style=border)


def _markup(text: str) -> str:
    return escape(printable_line(text))


def _add_steps(grid: Table, view: RunView, now: float) -> None:
    bar = ProgressBar(total=max(view.num_steps, 1), completed=view.steps_done, width=SPARKLINE_WIDTH)
    elapsed = duration(now - view.started)
    left = f", {duration(view.eta_s)} left" if view.eta_s and not view.ended else ""
    grid.add_row("steps", bar, Text(f"{view.steps_done} of {view.num_steps} done, {elapsed}{left}"))


def _add_stage(grid: Table, view: RunView, now: float) -> None:
    if view.ended:
        style = "green" if view.ended == "finished" else "red"
        grid.add_row("now", Text(view.ended, style=style), "")
        return
    if not view.stages:
        grid.add_row("now", Text("-", style="dim"), "")
        return
    stage = view.stages[-1]
    if stage.total:
        bar = ProgressBar(total=stage.total, completed=stage.done, width=SPARKLINE_WIDTH)
    else:
        bar = ProgressBar(total=None, pulse=True, width=SPARKLINE_WIDTH, animation_time=now)
    counted = f" {stage.done}/{stage.total}," if stage.total else ","
    grid.add_row("now", bar, Text(f"{stage.name}{counted} {duration(now - stage.started)}", style="bold"))


def _add_headline(grid: Table, view: RunView) -> None:
    figures = f"[bold]{view.history[-1]:.4f}[/]"
    if view.validation:
        figures += f"   [dim]validation[/] {view.validation[1]:.4f} [dim](step {view.validation[0]})[/]"
    grid.add_row(view.headline_label, Text(sparkline(view.history), style="cyan"), Text.from_markup(figures))
