"""Which side waits in asynchronous training, estimated from the seconds of a synchronous step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from roll_gspo.scheduling.lengths import LogNormalLengths
from roll_gspo.scheduling.simulation import Cluster, Schedule, simulate

# Larger batches and staleness give nearly the same shares, but take longer than a plan may.
_MAX_GROUPS, _MAX_SAMPLES, _MAX_STALENESS = 32, 8, 16
_STEPS = 6
_MEDIAN, _SIGMA, _LONGEST = 1000.0, 1.0, 20_000
_NO_TIME = 1e12  # tokens per second


@dataclass(frozen=True)
class Waiting:
    """Waiting time of both sides.

    Attributes:
        trainer: share of time in which the trainer waits for samples.
        engines: share of time in which the engines may not start new samples and have none left.
        relative_step: seconds per step, divided by those of synchronous training.
    """

    trainer: float
    engines: float
    relative_step: float


def waiting_side(generate_s: float, train_s: float, sync_s: float, samples: int, schedule: Schedule) -> Waiting:
    """Estimate which side waits, with long-tailed lengths (log-normal, sigma 1, longest 20 medians).

    All engines are modelled as one, which decodes all responses of a step at the same time. Its speed does not depend
    on their number.

    Args:
        generate_s: seconds of generation in a synchronous step.
        train_s: seconds of everything that the trainer computes in it.
        sync_s: seconds of its weight transfer.
        samples: responses per group.
        schedule: batches, mode and staleness of the asynchronous run.
    """
    groups, samples = min(schedule.groups_per_step, _MAX_GROUPS), min(samples, _MAX_SAMPLES)
    staleness = min(schedule.max_staleness, _MAX_STALENESS)
    lengths = LogNormalLengths(_MEDIAN, _SIGMA, _LONGEST, samples)
    schedule = replace(schedule, groups_per_step=groups, prompt_tokens=0.0, max_staleness=staleness)
    unit = Cluster(1, groups * samples, 1.0, 0.0, _NO_TIME, 0.0)
    synchronous = simulate(unit, replace(schedule, max_staleness=0), lengths, _STEPS, staleness + 1)
    tokens = synchronous.tokens_per_s * synchronous.step_s
    speeds = {"step_s": generate_s / synchronous.step_s, "trained_tokens_per_s": tokens / train_s, "sync_s": sync_s}
    result = simulate(replace(unit, **speeds), schedule, lengths, _STEPS, staleness + 1)
    return Waiting(result.trainer_idle, result.engines_idle, result.step_s / (generate_s + train_s + sync_s))
