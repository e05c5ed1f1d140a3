"""Turns of a sample that is an episode, as the sample browser shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from roll_gspo.rollout_files import Sample

MAX_TURNS = 200
MAX_MESSAGE_CHARACTERS = 20_000  # of all messages of an episode
_TURN = {"answer", "messages", "reward", "invalid", "metrics", "given_tokens", "tokens"}


def is_episode(sample: Sample) -> bool:
    """Return whether a sample has turns that can be shown."""
    turns = sample.get("turns")
    return isinstance(turns, list) and all(isinstance(turn, dict) and turn.keys() >= _TURN for turn in turns)


def episode_entry(sample: Sample) -> dict[str, Any]:
    """Return the turns and the end of an episode, without values that say nothing."""
    turns: list[dict[str, Any]] = sample["turns"]
    versions = list(_turn_versions(sample))
    left = MAX_MESSAGE_CHARACTERS
    shown = []
    for turn, own in list(zip(turns, versions, strict=True))[:MAX_TURNS]:
        messages = [_message(message, max(left, 0)) for message in turn["messages"] or ()]
        left -= sum(len(message["content"]) for message in messages)
        entry = {
            "given": turn["given_tokens"],
            "tokens": turn["tokens"],
            "reward": turn["reward"],
            "invalid": turn["invalid"] or None,
            "metrics": turn["metrics"] or None,
            "messages": messages or None,
            "versions": own or None,
        }
        shown.append({name: value for name, value in entry.items() if value is not None})
    return {
        "turns": shown,
        "num_turns": len(turns),
        "end": sample.get("end"),
        "given": sample.get("given_length"),
        "rewritten": sample.get("num_rewritten") or None,
        "branches": sample.get("num_branches"),
        "traceback": sample.get("traceback") or None,
    }


def response_mask(sample: Sample, length: int) -> list[bool] | None:
    """Return which tokens of a response of `length` tokens were sampled; None for a response of one turn."""
    mask = sample.get("response_mask")
    return mask if isinstance(mask, list) and len(mask) == length else None


def spread_values(values: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    """Return values of the sampled tokens at their positions; None at the others."""
    sampled = iter(values)
    return [next(sampled) if is_sampled else None for is_sampled in mask]


def _turn_versions(sample: Sample) -> Iterator[list[int]]:
    """Yield the versions of the weights that sampled each answer; nothing if one version sampled all."""
    runs = sample.get("version_runs") or ()
    has_several = len({run["version"] for run in runs}) > 1
    ends, end = [], 0
    for run in runs:
        end += run["tokens"]
        ends.append((run["version"], end))
    start = 0
    for turn in sample["turns"]:
        first, last = start + turn["given_tokens"], start + turn["given_tokens"] + turn["tokens"]
        begins = [0, *(end for _, end in ends)]
        own = [v for (v, end), begin in zip(ends, begins, strict=False) if begin < last and end > first]
        yield own if has_several else []
        start = last


def _message(message: Mapping[str, Any], limit: int) -> dict[str, str]:
    content, fields = str(message.get("content") or ""), message.get("fields")
    hidden = len(content) - limit
    shown = content if hidden <= 0 else f"{content[:limit]}… ({hidden} more characters)"
    entry = {"role": str(message.get("role")), "content": shown}
    return entry if not fields else entry | {"fields": str(fields)[:limit]}
