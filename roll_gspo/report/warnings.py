"""Problems that a run logged: failed rewards, skipped updates, metrics that were not finite, warnings of run.log."""

from __future__ import annotations

import math
from collections.abc import Sequence

from roll_gspo.config.clip_range import MAX_NOISE_SHARE
from roll_gspo.report.numbers import format_number
from roll_gspo.report.run_folder import RunFolder

COUNTED_PROBLEMS = {  # metrics whose sum should be 0
    "actor/skipped_updates": "optimizer updates skipped",
    "critic/skipped_updates": "optimizer updates of the critic skipped",
    "reward/failed": "rewards failed",
}
_MAX_LISTED_STEPS = 12


def run_warnings(run: RunFolder) -> list[str]:
    """Return one sentence per problem; empty if there are none."""
    found = []
    for name, problem in COUNTED_PROBLEMS.items():
        points = [(step, value) for step, value in run.points(name) if value]
        if points:
            total = format_number(sum(value for _, value in points))
            found.append(f"{total} {problem} (at {_listed([step for step, _ in points])})")
    for name in ("actor/ratio_noise", "mismatch/ratio_rms"):
        limits = dict(run.points("actor/clip_distance"))
        noisy = [step for step, value in run.points(name) if value > MAX_NOISE_SHARE * limits.get(step, math.inf)]
        if noisy:
            found.append(f"{name} was above a third of the clip range (at {_listed(noisy)})")
    return found + [f"{name} was not finite at {_listed(steps)}" for name, steps in run.not_finite().items()]


def _listed(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:_MAX_LISTED_STEPS]))
    more = f" and {len(steps) - _MAX_LISTED_STEPS} more" if len(steps) > _MAX_LISTED_STEPS else ""
    return f"{'step' if len(steps) == 1 else 'steps'} {shown}{more}"
