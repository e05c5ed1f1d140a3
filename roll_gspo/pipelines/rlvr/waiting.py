"""Plan rows of asynchronous training: the staleness limit, and which side will wait (no torch)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from roll_gspo.config.experiment import ExperimentConfig
from roll_gspo.scheduling.simulation import Schedule
from roll_gspo.scheduling.waiting import Waiting, waiting_side
from roll_gspo.tracking.jsonl import read_metrics

ASSUMED_RATIO = 2.0  # seconds of generation per second of training
_GENERATION = ("time/generate", "time/score")
_TRAINING = tuple(
    f"time/{name}"
    for name in ("reference_log_probs", "old_log_probs", "advantages", "values", "update_critic", "update")
)
_SYNC = ("time/sync_weights",)
_SAME = ("rollout_batch_size", "num_return_sequences_in_group")
_NOT_WORTH_NAMING = 0.02


@dataclass(frozen=True)
class _Seconds:
    """Seconds of a synchronous step, and their source."""

    generation: float
    training: float
    sync: float
    source: str


def async_texts(config: ExperimentConfig) -> Iterator[str]:
    """Yield texts of the plan if `async_generation_ratio` is above 0."""
    if not config.is_async:
        return
    partial = f", unfinished responses: {config.partial_rollouts}" if config.updates_in_flight else ""
    yield f"{config.async_mode}: trained tokens are at most {config.async_generation_ratio} step(s) old{partial}"
    if config.execution == "local":
        yield "execution: local generates and trains in turn, so that no time is saved; execution: ray overlaps them"
        return
    seconds = _measured(config) or _Seconds(
        ASSUMED_RATIO,
        1.0,
        0.0,
        f"assumed: generation takes {ASSUMED_RATIO:g} × as long as training, because no synchronous run of "
        f"{config.exp_name} with this batch has metrics",
    )
    schedule = Schedule(
        groups_per_step=config.rollout_batch_size,
        prompt_tokens=0.0,
        max_staleness=config.async_generation_ratio,
        mode=config.async_mode,
        partial_rollouts=config.partial_rollouts,
    )
    samples = config.num_return_sequences_in_group
    waiting = waiting_side(seconds.generation, seconds.training, seconds.sync, samples, schedule)
    yield f"{_side_text(waiting)}; a step takes about {waiting.relative_step:.2f} × a synchronous one"
    yield seconds.source
    yield (
        "assumed: long-tailed lengths, decode steps that take equally long with any number of requests; "
        "python -m roll_gspo.simulate computes with yours"
    )


def _side_text(waiting: Waiting) -> str:
    sides = {"the trainer": waiting.trainer, "engines": waiting.engines}
    texts = [f"{side} {share:.0%}" for side, share in sides.items() if share >= _NOT_WORTH_NAMING]
    return f"idle: {', '.join(texts)} of the time" if texts else "neither the trainer nor engines wait"


def _measured(config: ExperimentConfig) -> _Seconds | None:
    """Return the median seconds of the newest synchronous run of this experiment with the same batch, if any."""
    files = Path(config.output_dir, config.exp_name).glob("*/metrics.jsonl")
    for metrics in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        if _is_comparable(metrics.with_name("config.yaml"), config):
            rows = [row for row in read_metrics(metrics) if row.get("time/generate") and row.get("time/update")]
            if rows:
                generation, training, sync = (_median(rows, names) for names in (_GENERATION, _TRAINING, _SYNC))
                text = f"measured in {metrics.parent}: generation {generation:.3g} s, training {training:.3g} s"
                return _Seconds(generation, training, sync, text)
    return None


def _is_comparable(path: Path, config: ExperimentConfig) -> bool:
    """Return whether the run of a `config.yaml` was synchronous and had batches of the same size."""
    try:
        values: Any = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError):
        return False
    if not isinstance(values, dict) or values.get("async_generation_ratio", 0):
        return False
    return all(values.get(key) == config.__dict__[key] for key in _SAME)


def _median(rows: list[dict[str, Any]], names: tuple[str, ...]) -> float:
    return statistics.median(sum(row.get(name) or 0.0 for name in names) for row in rows)
