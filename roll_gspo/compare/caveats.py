"""Caveats of a comparison: runs that are short, broken or have no other seed."""

from __future__ import annotations

from collections.abc import Sequence

from roll_gspo.compare.runs import Group, Run
from roll_gspo.report.html_page import plural
from roll_gspo.report.numbers import format_number
from roll_gspo.report.run_folder import SCORE, VALIDATION
from roll_gspo.report.warnings import COUNTED_PROBLEMS

_MAX_METRICS = 4


def find_caveats(groups: Sequence[Group], empty: Sequence[Run]) -> list[str]:
    """Return one sentence per caveat.

    Args:
        groups: what is compared.
        empty: runs that have not logged a step; they are in no group.
    """
    found = [f"{run.folder}: no step has been logged; the run is left out" for run in empty]
    found += _seed_caveats(groups)
    for group in groups:
        for run in group.runs:
            found += [f"{group.label}, seed {run.seed}: {caveat}" for caveat in _run_caveats(run)]
    without_rewards = [group.label for group in groups if not any(run.points(SCORE) for run in group.runs)]
    if without_rewards:
        found.append(f"{', '.join(without_rewards)}: no rewards in metrics.jsonl")
    if len({max(run.last_step for run in group.runs) for group in groups}) > 1:
        found.append("The numbers of steps differ between configurations: final values are not at equal steps")
    commits = {run.commit for group in groups for run in group.runs if run.commit}
    if len(commits) > 1:
        found.append(f"The runs are of different git commits: {', '.join(sorted(commits))}")
    return found


def _seed_caveats(groups: Sequence[Group]) -> list[str]:
    found = []
    for group in groups:
        seeds = [run.seed for run in group.runs]
        repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if repeated:
            found.append(f"{group.label}: more than one run of seed {', '.join(repeated)}; each counts")
    if len({frozenset(run.seed for run in group.runs) for group in groups}) > 1:
        listed = "; ".join(f"{group.label}: {', '.join(run.seed for run in group.runs)}" for group in groups)
        found.append(f"The seeds differ between configurations ({listed})")
    single = [group.label for group in groups if len(group.runs) == 1]
    if single:
        found.append(f"{', '.join(single)}: one run only; the spread over seeds is unknown")
    return found


def _run_caveats(run: Run) -> list[str]:
    found = []
    if run.is_short:
        found.append(f"stopped or still running at step {run.last_step} of {run.max_steps}")
    validation = run.points(VALIDATION)
    if not validation:
        found.append("no validation")
    elif validation[-1][0] < run.last_step:
        found.append(f"the last validation was at step {validation[-1][0]}, before the last step {run.last_step}")
    for name, problem in COUNTED_PROBLEMS.items():
        total = sum(value for _, value in run.record.points(name))
        if total:
            found.append(f"{format_number(total)} {problem}")
    not_finite = [f"{name} at {plural(len(steps), 'step')}" for name, steps in run.record.not_finite().items()]
    if not_finite:
        hidden = len(not_finite) - _MAX_METRICS
        more = f" and {plural(hidden, 'other metric')}" if hidden > 0 else ""
        found.append(f"not finite, excluded from curves and means: {', '.join(not_finite[:_MAX_METRICS])}{more}")
    return found
