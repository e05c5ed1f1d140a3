"""Run folders without a training: real configurations, and metrics written by the real tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from composed import load_config

from roll_gspo.pipelines.run_folder import config_yaml
from roll_gspo.tracking.jsonl import JsonlTracker

MetricsRow = Callable[[int], Mapping[str, float]]


@cache
def config_text(*overrides: str) -> str:
    """Return config.yaml of example_gspo with these overrides."""
    return config_yaml(load_config("example_gspo", *overrides).config)


def all_metrics(step: int, shift: float = 0.0, tokens: float = 1000.0, seconds: float = 2.0) -> dict[str, float]:
    """Return the metrics of a step. The score rises by 0.01 per step; every 10th step is validated."""
    row = {
        "rollout/score_mean": 0.2 + 0.01 * step + shift,
        "reward/score_mean": 0.9,  # of kept samples only: the comparison must not use it
        "rollout/response_length_mean": 20.0 + shift,
        "rollout/num_tokens": tokens,
        "actor/clip_fraction": 0.1 + shift,
        "actor/ratio_deviation": 0.004 + shift / 100,
        "actor/entropy": 0.5 + shift,
        "actor/grad_norm": 2.0 + shift,
        "actor/kl_ref": 0.01 * step,
        "time/step": seconds,
    }
    return row | ({"validation/score_mean": 0.3 + 0.01 * step + shift} if step % 10 == 0 else {})


def two_metrics(step: int) -> dict[str, float]:
    """Return the metrics of two panels: a panel takes a fifth of a second to draw."""
    names = ("rollout/score_mean", "actor/clip_fraction")
    return {name: value for name, value in all_metrics(step).items() if name in names}


def write_run(
    folder: Path,
    *overrides: str,
    seed: int = 0,
    steps: int = 20,
    max_steps: int = 20,
    row: MetricsRow = all_metrics,
) -> Path:
    """Write a run's folder: config.yaml, and metrics.jsonl with step 0 (validation) and `steps` steps."""
    folder.mkdir(parents=True)
    text = config_text(*overrides, f"seed={seed}", f"max_steps={max_steps}", f"run_name='{folder.name}'")
    (folder / "config.yaml").write_text(text)
    tracker = JsonlTracker(folder / "metrics.jsonl")
    if "validation/score_mean" in row(10):
        tracker.log(0, {"validation/score_mean": 0.3})
    for step in range(1, steps + 1):
        tracker.log(step, row(step))
    tracker.close()
    return folder


def write_sweep(folder: Path, *, seeds: int = 3, algorithms: tuple[str, ...] = ("gspo", "grpo")) -> Path:
    """Write the runs of `--multirun algorithm=gspo,grpo seed=0,1,2`; the metrics of seed i are shifted by 0.02 i."""
    for a, algorithm in enumerate(algorithms):
        for seed in range(seeds):
            write_run(
                folder / f"{a * seeds + seed:03d}_algorithm-{algorithm}_seed-{seed}",
                f"algorithm={algorithm}",
                seed=seed,
                row=lambda step, shift=0.02 * seed: all_metrics(step, shift),
            )
    return folder
