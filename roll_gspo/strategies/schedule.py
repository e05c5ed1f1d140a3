"""Learning rate of every engine: linear warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math

from roll_gspo.strategies.base import OptimizerSetup


def learning_rate(setup: OptimizerSetup, applied_steps: int) -> float:
    """Return the rate of the optimizer step after `applied_steps` applied ones (skipped updates do not count).

    Warm-up step k of w uses (k + 1) / w of the rate, so that no step has rate 0. The decay starts from the full rate
    after warm-up, reaches `min_learning_rate` at `total_steps`, and stays there.
    """
    if applied_steps < setup.warmup_steps:
        return setup.learning_rate * (applied_steps + 1) / setup.warmup_steps
    if setup.lr_scheduler_type == "constant":
        return setup.learning_rate
    decay_steps = max(setup.total_steps - setup.warmup_steps, 1)
    progress = min((applied_steps - setup.warmup_steps) / decay_steps, 1.0)
    kept = 1.0 - progress if setup.lr_scheduler_type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return setup.min_learning_rate + (setup.learning_rate - setup.min_learning_rate) * kept
