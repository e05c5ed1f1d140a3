"""What a reader must know before believing a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from roll_gspo.compare.panels import SCORE, VALIDATION
from roll_gspo.compare.runs import Group, Run
from roll_gspo.report.curves import figure as digits

_MAX_METRICS = 4
_SUMS = {
    "actor/skipped_updates": "optimizer steps skipped",
    "critic/skipped_updates": "optimizer steps of the critic skipped",
    "reward/failed": "rewards that could not be computed",
}


def remarks(groups: Sequence[Group], empty: Sequence[Run]) -> list[str]:
    """One sentence each about runs that are short, broken or alone.

    Args:
        groups: what is compared.
        empty: runs that have not logged a step and are not in any group.
    """
    found = [f"{run.folder}: no step has been logged, so the run is left out" for run in empty]
    found += _seeds(groups)
    for group in groups:
        for run in group.runs:
            found += [f"{group.label}, seed {run.seed}: {problem}" for problem in _problems(run)]
    without = [group.label for group in groups if not any(run.points(SCORE) for run in group.runs)]
    if without:
        found.append(f"{', '.join(without)}: no rewards in metrics.jsonl")
    ends = {max(run.last_step for run in group.runs) for group in groups}
    if len(ends) > 1:
        found.append(
            "The configurations were run for different numbers of steps: final values are not at equal steps, the "
            "curves are"
        )
    return found


def _seeds(groups: Sequence[Group]) -> list[str]:
    found = []
    for group in groups:
        seeds = [run.seed for run in group.runs]
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice:
            found.append(f"{group.label}: more than one run of seed {', '.join(twice)}; each counts")
    if len({frozenset(run.seed for run in group.runs) for group in groups}) > 1:
        listed = "; ".join(f"{group.label}: {', '.join(run.seed for run in group.runs)}" for group in groups)
        found.append(f"The configurations were not run with the same seeds ({listed})")
    alone = [group.label for group in groups if len(group.runs) == 1]
    if alone:
        found.append(f"{', '.join(alone)}: one run, so nothing is known about the spread over seeds")
    return found


def _problems(run: Run) -> list[str]:
    found = []
    if run.max_steps is not None and run.last_step < run.max_steps:
        found.append(f"ended (or is) at step {run.last_step} of {run.max_steps}")
    validation = run.points(VALIDATION)
    if not validation:
        found.append("no validation")
    elif validation[-1][0] < run.last_step:
        found.append(f"the last validation is that of step {validation[-1][0]}, not of its last step {run.last_step}")
    for name, what in _SUMS.items():
        total = sum(value for _, value in run.record.points(name))
        if total:
            found.append(f"{digits(total)} {what}")
    broken = run.record.not_finite()
    listed = [f"{name} at {len(steps)} step{'s' * (len(steps) > 1)}" for name, steps in broken.items()]
    if listed:
        more = f" and {len(listed) - _MAX_METRICS} other metrics" if len(listed) > _MAX_METRICS else ""
        found.append(f"not finite, left out of curves and means: {', '.join(listed[:_MAX_METRICS])}{more}")
    return found
