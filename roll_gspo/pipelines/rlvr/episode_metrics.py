"""Metrics of the episodes of a step: turns, tokens, ends, and what the environments report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from roll_gspo.batch import Completion
from roll_gspo.environments.pool import EnvironmentTime
from roll_gspo.episode import Episode
from roll_gspo.roles.episodes import DONE, FAILED, TIME_LIMIT, TOKEN_LIMIT, TURN_LIMIT

ENDS = (DONE, TURN_LIMIT, TOKEN_LIMIT, TIME_LIMIT, FAILED)


def episode_metrics(completions: Sequence[Completion], domains: Sequence[str]) -> dict[str, float]:
    """Return `episode/*` and `env/<environment>/*`; empty without episodes.

    Failed episodes count only in the shares of the ends.

    Args:
        completions: the responses.
        domains: environment of each response.
    """
    pairs = zip(completions, domains, strict=True)
    found = [(completion.episode, domain) for completion, domain in pairs if completion.episode is not None]
    if not found:
        return {}
    ends = Counter(episode.end for episode, _ in found)
    metrics = {f"episode/end_{end}": ends[end] / len(found) for end in ENDS}
    valid = [(episode, domain) for episode, domain in found if episode.failed is None]
    return metrics | _turn_metrics([episode for episode, _ in valid]) | _environment_metrics(valid)


def environment_time_metrics(now: EnvironmentTime, before: EnvironmentTime) -> dict[str, float]:
    """Return the seconds that environments worked since `before`, and the share that cost no time."""
    total_s, hidden_s = now.total_s - before.total_s, now.hidden_s - before.hidden_s
    return {"environment/seconds": total_s, "environment/hidden_share": hidden_s / total_s if total_s else 1.0}


def _turn_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    played = [(episode, *episode.branches) for episode in episodes]
    turns = [turn for conversations in played for one in conversations for turn in one.turns]
    if not turns:
        return {}
    num_turns = [sum(len(one.turns) for one in conversations) for conversations in played]
    masks = [one.mask for conversations in played for one in conversations]
    num_tokens, num_sampled = sum(map(len, masks)), sum(map(sum, masks))
    return {
        "episode/turns_mean": len(turns) / len(episodes),
        "episode/turns_max": float(max(num_turns)),
        "episode/tokens_per_turn": num_sampled / len(turns),
        "episode/given_tokens_fraction": 1 - num_sampled / max(num_tokens, 1),
        "episode/invalid_turns": sum(turn.invalid for turn in turns) / len(turns),
        "episode/branches_mean": sum(episode.num_branches for episode in episodes) / len(episodes),
        "episode/rewritten": float(sum(episode.num_rewritten for episode in episodes)),
    }


def _environment_metrics(episodes: Sequence[tuple[Episode, str]]) -> dict[str, float]:
    """Return `env/<environment>/<name>`: the mean over the turns that report the metric."""
    values: dict[str, list[float]] = {}
    for episode, domain in episodes:
        for turn in episode.turns:
            for name, value in turn.metrics.items():
                values.setdefault(f"env/{domain}/{name}", []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}
